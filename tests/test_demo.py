# SPDX-License-Identifier: Apache-2.0
"""The demo, on a film of a minute and a half: it renders once, asks through the command line, and says what broke."""

from pathlib import Path

import pytest

from hourllava import demo
from hourllava.data import TOPICS, Film


@pytest.fixture(autouse=True)
def short_film(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "SECONDS", 96)
    monkeypatch.setattr(demo, "FOLDER", tmp_path / "demo")


def test_asks_one_question_of_each_topic_about_short_events() -> None:
    questions = demo.one_of_each_topic(Film.random(demo.SEED, 3600))
    assert [q.topic for q in questions] == list(TOPICS)
    assert all(q.needle for q in questions)
    assert len({q.second for q in questions}) == len(questions)


def test_shows_answers_evidence_and_times(capfd: pytest.CaptureFixture[str]) -> None:
    assert demo.main() == 0
    shown = capfd.readouterr().out
    assert (demo.FOLDER / "attention.png").stat().st_size > 10_000
    for promised in ("$ hourllava ask", "the event was at", "of 6 right", "question 6", "times less"):
        assert promised in shown


def test_renders_once() -> None:
    console = demo.Console(quiet=True)
    film = Film.random(demo.SEED, 8)
    first = demo.render(film, console)
    written = first.stat().st_mtime_ns
    assert demo.render(film, console) == first
    assert first.stat().st_mtime_ns == written
    assert demo.render(Film.random(demo.SEED, 9), console) != first


def test_a_failing_command_fails_the_demo(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(film: Film, console: demo.Console) -> Path:
        path = demo.FOLDER / "film.mp4"
        path.parent.mkdir()
        path.write_text("no video")
        return path

    monkeypatch.setattr(demo, "render", unreadable)
    assert demo.main() == 1
    errors = capfd.readouterr().err
    assert errors.splitlines()[-1].startswith("hourllava: demo: `hourllava ask` ended with exit code 1;")
    assert "Traceback" not in errors
