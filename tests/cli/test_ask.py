# SPDX-License-Identifier: Apache-2.0
"""`hourllava ask` and `hourllava watch` on good input: text, JSON, picture, and a memory in place of the video."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import CLIP_SECONDS
from PIL import Image

import hourllava.model.asking
from hourllava.cli import main
from hourllava.cli.plot import plot_attention
from hourllava.model import Answer, Moment
from hourllava.video import clock

QUESTIONS = ["Which colour was the star?", "Was it 5 $ or 6 $_?"]  # no formula, in the picture either


def test_text(clip: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", clip, *QUESTIONS, "--model", model]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line for line in lines if line in QUESTIONS] == QUESTIONS
    assert sum(line.startswith("  rests on 00:") and "%" in line for line in lines) == 2
    stages = [line.split(":")[0] for line in lines if line.endswith(" s")]
    assert stages == ["decode", "encode", "memory", "question 1", "question 2"]
    assert err == ""  # no bar where nobody watches


def test_json(clip: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", clip, *QUESTIONS, "--model", model, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["video"] == clip
    assert document["seconds"] == CLIP_SECONDS
    assert document["damage"] is None
    assert set(document["watch"]) == {"decode", "encode", "memory"}
    assert [answer["question"] for answer in document["answers"]] == QUESTIONS
    for answer in document["answers"]:
        assert isinstance(answer["answer"], str)
        assert len(answer["mass"]) == CLIP_SECONDS
        assert sum(answer["mass"]) == pytest.approx(1, abs=1e-5)
        for moment in answer["moments"]:
            assert 0 <= moment["start"] < moment["end"] <= CLIP_SECONDS
            inside = answer["mass"][int(moment["start"]) : int(moment["end"])]
            assert moment["share"] == pytest.approx(sum(inside), abs=1e-5)
        assert all(took >= 0 for took in answer["timings"].values())


def test_progress_on_request(clip: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", clip, "Where?", "--model", model, "--progress"]) == 0
    out, err = capsys.readouterr()
    assert f"{CLIP_SECONDS}/{CLIP_SECONDS}" in err
    assert f"{CLIP_SECONDS}/{CLIP_SECONDS}" not in out


def test_a_memory_answers_without_the_video(
    clip: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "clip.memory"
    assert main(["watch", clip, "-o", str(memory), "--model", model]) == 0
    assert f"the memory of 00:{CLIP_SECONDS} of {clip}" in capsys.readouterr().out
    assert main(["ask", clip, QUESTIONS[0], "--model", model, "--json"]) == 0
    from_video = json.loads(capsys.readouterr().out)

    def refuse(*_: object) -> None:
        raise AssertionError("the video was opened")

    monkeypatch.setattr("hourllava.model.watching.open_video", refuse)
    assert main(["ask", str(memory), QUESTIONS[0], "--model", model, "--json"]) == 0
    from_memory = json.loads(capsys.readouterr().out)
    assert set(from_memory["watch"]) == {"load"}
    for field in ("answer", "mass", "moments"):
        assert from_memory["answers"][0][field] == from_video["answers"][0][field]


def test_plot(clip: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "attention.png"
    assert main(["ask", clip, *QUESTIONS, "星は何色", "--model", model, "--plot", str(picture)]) == 0
    assert capsys.readouterr().err == ""
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width > 1000


def test_two_pictures_are_not_one(clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(tmp_path / "a.png")
    assert main(["ask", clip, "What?", "--plot", picture, "--evidence", picture]) == 1
    assert "--plot and --evidence: they name the same file" in capsys.readouterr().err


def test_plot_marks_the_moments_of_an_hour(tmp_path: Path) -> None:
    """Two seconds of 3600 can be seen: their mark is in the picture, and is not there without them."""
    mass = torch.full((3600,), 0.3 / 3598)
    mass[3000:3002] = 0.35
    marked = Answer("red", [Moment(3000.0, 3002.0, 0.7)], mass, {}, [])
    unmarked = Answer("red", [], mass, {}, [])
    rows = {}
    for name, answer in (("marked", marked), ("unmarked", unmarked)):
        plot_attention(tmp_path / f"{name}.png", [("Which colour was the star?", answer)] * 2, "film.mp4")
        with Image.open(tmp_path / f"{name}.png") as image:
            red = np.asarray(image.convert("RGB"))
            rows[name] = ((red[..., 0] > 180) & (red[..., 1] < 110) & (red[..., 2] < 130)).sum().item()
    assert rows["unmarked"] == 0
    assert rows["marked"] > 2 * 100


def test_moments_as_a_player_shows_them() -> None:
    assert str(Moment(724.0, 726.0, 0.5)) == "12:04-12:05"
    assert str(Moment(724.0, 725.0, 0.5)) == "12:04"
    assert clock(3599.9) == "59:59"
    assert clock(3600) == "1:00:00"


def test_answers_cite_their_times() -> None:
    moments = [Moment(724.0, 726.0, 0.5), Moment(61.0, 62.0, 0.2), Moment(5.0, 6.0, 0.1), Moment(9.0, 10.0, 0.1)]
    answer = Answer("red", moments, torch.ones(1), {}, [])
    assert answer.cite() == "red [12:04-12:05, 01:01, 00:05]"
    assert answer.cite(1) == "red [12:04-12:05]"
    assert Answer("red", [], torch.ones(1), {}, []).cite() == "red"


def test_subtitles_join_the_question(
    clip: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "film.srt"
    path.write_text("1\n00:00:01,000 --> 00:00:03,500\n<i>Good morning.</i>\n")
    asked = []
    build = hourllava.model.asking.build_prompt
    monkeypatch.setattr("hourllava.model.asking.build_prompt", lambda *a: asked.append(a[1]) or build(*a))
    assert main(["ask", clip, QUESTIONS[0], "--model", model, "--subtitles", str(path), "--json"]) == 0
    assert asked == [f"This video's subtitles are listed below:\nGood morning.\n{QUESTIONS[0]}"]
    assert json.loads(capsys.readouterr().out)["answers"][0]["question"] == QUESTIONS[0]
