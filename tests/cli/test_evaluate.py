# SPDX-License-Identifier: Apache-2.0
"""`hourllava evaluate BENCHMARK`: the report, the table, exit codes, and what is refused before anything is done."""

import json
from pathlib import Path
from typing import Any

import benchmark_folders as folders
import pytest

from hourllava import evaluate
from hourllava.cli import evaluate as command
from hourllava.cli import main
from hourllava.cli.evaluate import print_report
from hourllava.evaluate.running import BenchmarkReport, Lost, write_json
from hourllava.evaluate.scores import Scores


def test_the_command_knows_every_benchmark() -> None:
    assert command.BENCHMARKS.keys() == evaluate.BENCHMARKS.keys()


def test_a_benchmark_from_folder_to_report(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = folders.video_mme(tmp_path / "data", videos=["vidS", "vidM"])
    asked = ["evaluate", "videomme", "--data", str(data), "--model", model, "--subtitles", "--budget", "1/2"]
    assert main(asked) == 3
    out = capsys.readouterr().out
    assert "Video-MME: 2 of 3 videos available, 1 missing, 1 without subtitles" in out
    assert "missing videos, 1: vidL" in out
    assert "4 of 6 questions asked" in out
    assert "report: build/evaluate/videomme-subtitles.json; every answer: " in out
    report = json.loads(Path("build/evaluate/videomme-subtitles.json").read_text())
    assert report["model"] == model
    assert report["versions"].keys() == {"python", "hourllava", "torch", "transformers", "av"}
    assert report["settings"]["budget"] == "1/2"
    assert report["settings"]["subtitles"] is True
    assert report["lost"]["missing"] == ["vidL"]
    assert report["questions"] == {"all": 6, "asked": 4}
    assert report["total"]["asked"] == 4
    assert report["breakdowns"]["duration"].keys() == {"short", "medium"}
    answers = Path("build/evaluate", report["answers"]).read_text().splitlines()
    assert len(answers) == 1 + 4
    first = json.loads(answers[1])
    assert first["right"] == (first["chosen"] == first["answer"])

    folders.write_videos(data / "data", ["vidL"])
    assert main([*asked, "-o", "build/evaluate/videomme-subtitles.json"]) == 0  # goes on with the same answers
    assert "3 of 3 videos available, 0 missing" in capsys.readouterr().out
    assert Path("build/evaluate", report["answers"]).read_text().splitlines()[:5] == answers
    assert len(list(Path("build/evaluate/memories").iterdir())) == 3 + 1  # and the catalogue


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget", "half"], "'half' is no budget"),
        (["--subtitle-frames", "32"], "--subtitle-frames: it says which subtitles are read; give --subtitles, too"),
        (["--model", "nowhere"], "there is no such model"),
        (["-o", "nowhere/report.json"], "there is no folder nowhere"),
        (["--data", "nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_what_is_refused(
    options: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert main(["evaluate", "videomme", "--data", "data", *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_films_are_what_there_is_without_a_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("hourllava.evaluate.hour.main", lambda **options: asked.append(options) or 0)
    assert main(["evaluate"]) == 0
    assert main(["evaluate", "--videos", "3", "--model", "m"]) == 0
    assert asked == [{"videos": 20, "model": "tiny"}, {"videos": 3, "model": "m"}]
    assert main(["evaluate", "--videos", "3", "lvbench", "--data", str(tmp_path)]) == 1
    assert "--videos: it is for rendered films" in capsys.readouterr().err
    wrong = [["lvbench"], ["lvbench", "--data", "x", "--subtitles"], ["--videos", "0"], ["mmlu", "--data", "x"]]
    wrong.append(["videomme", "--data", "x", "--subtitles", "--subtitle-frames", "0"])
    for arguments in wrong:
        with pytest.raises(SystemExit, match="2"):
            main(["evaluate", *arguments])
    # A model named before the benchmark is that of the benchmark.
    assert main(["evaluate", "--model", "nowhere", "lvbench", "--data", str(tmp_path), "-o", f"{tmp_path}/x.json"]) == 1
    assert "nowhere: there is no such model" in capsys.readouterr().err


def test_nothing_that_was_lost_goes_untold(capsys: pytest.CaptureFixture[str]) -> None:
    lost = Lost(
        missing=[f"m{number}" for number in range(7)],
        unreadable={"u": "is not a video"},
        damaged={"d": "2 of 9 s are lost"},
        refused={f"q{number}": "too long" for number in range(6)},
    )
    report = BenchmarkReport("[b]", {}, 20, 60, None, lost, Scores.of([("A", "A", (("task", "x"),))]))
    print_report(report, "videos.zip may still have to be unpacked")
    out = capsys.readouterr().out
    assert "[b]: 12 of 20 videos available, 8 missing" in out
    assert "missing videos, 7: m0, m1, m2, m3, m4, ... (videos.zip may still have to be unpacked)" in out
    assert "u: could not be asked about: is not a video" in out
    assert "d: damaged, asked about what is left: 2 of 9 s are lost" in out
    assert "q4: not asked: too long\n1 more: not asked, as the report says" in out
    assert "100.0" in out
    assert "20.7-100.0" in out


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
