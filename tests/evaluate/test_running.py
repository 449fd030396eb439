# SPDX-License-Identifier: Apache-2.0
"""A benchmark is run once: what is watched and answered is kept, and what is missing or damaged is told and counted."""

import json
import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import benchmark_folders as folders
import pytest
import torch
from benchmark_folders import SECONDS, Parrot
from clips import cut, write_clip
from tiny_model import make_model

from hourllava.data.embedding import list_jobs, take_in
from hourllava.errors import DataError, HourLlavaError, VideoError
from hourllava.evaluate import BENCHMARKS, BenchmarkReport, DataFolder, RunOptions, run_benchmark
from hourllava.evaluate.answers import AnswerLog
from hourllava.evaluate.running import run_settings
from hourllava.evaluate.watched import WatchedVideos
from hourllava.memory import Repository
from hourllava.model import FrameWriter, HourLlavaForConditionalGeneration


@pytest.fixture(scope="module")
def model() -> HourLlavaForConditionalGeneration:
    return make_model()


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> Parrot:
    """Says B to everything."""
    bird = Parrot("The best answer is: B.")
    monkeypatch.setattr(HourLlavaForConditionalGeneration, "ask", lambda *args, **kwargs: bird(*args, **kwargs))
    return bird


def run(model: Any, root: Path, name: str = "videomme", **options: Any) -> BenchmarkReport:
    """Run a benchmark whose files are in `root`/data, with everything it writes beside that."""
    folder = DataFolder(root / "data")
    answers = root / "answers.jsonl"
    return run_benchmark(
        model, BENCHMARKS[name], folder, root / "memories", answers, RunOptions(**options), progress=False
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def watching_is_an_error(model: HourLlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a frame was encoded again")

    monkeypatch.setattr(model.model.vision_tower, "forward", refuse)


def test_every_video_is_watched_once_and_asked_all_its_questions(model: Any, parrot: Parrot, tmp_path: Path) -> None:
    folders.video_mme(tmp_path / "data")
    report = run(model, tmp_path)
    assert (report.videos, report.available, report.questions) == (3, 3, 6)
    assert not report.lost
    total = report.scores.total
    assert (total.asked, total.right, total.unread) == (6, 2, 0)  # the right ones are A, B, C, D, A, B
    durations = report.scores.breakdowns["duration"]
    assert {name: (s.asked, s.right) for name, s in durations.items()} == {
        "short": (2, 1),
        "medium": (2, 0),
        "long": (2, 1),
    }
    assert [path.rpartition("/")[2].partition("-")[0] for path, _, _ in parrot.asked] == ["videomme"] * 6
    assert len({path for path, _, _ in parrot.asked}) == 3
    assert {options["max_new_tokens"] for _, _, options in parrot.asked} == {16}
    header, *answers = lines(tmp_path / "answers.jsonl")
    assert header["settings"] == json.loads(json.dumps(report.settings))
    assert [answer["id"] for answer in answers] == ["001-1", "001-2", "002-1", "002-2", "003-1", "003-2"]
    assert answers[1] == {
        "id": "001-2",
        "video": "vidS",
        "reply": "The best answer is: B.",
        "chosen": "B",
        "answer": "B",
        "right": True,
        "groups": [["duration", "short"], ["task", "OCR Problems"], ["domain", "Knowledge"], ["sub-category", "Law"]],
        "moments": [[1.0, 3.0, 0.5]],
        "time_reference": "",
        "seconds": SECONDS,
        "damage": "",
        "subtitles": False,
    }


def test_what_is_watched_and_answered_is_kept(
    model: Any, parrot: Parrot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other subtitles nothing is watched again, and the same run has nothing left to do."""
    folders.video_mme(tmp_path / "data")
    first = run(model, tmp_path)
    watching_is_an_error(model, monkeypatch)
    parrot.asked.clear()
    again = run(model, tmp_path)
    assert parrot.asked == []
    assert again.to_dict() == first.to_dict()
    (tmp_path / "answers.jsonl").rename(tmp_path / "plain.jsonl")
    report = run(model, tmp_path, subtitles=True, budget="1/2")
    prompts = [prompt for _, prompt, _ in parrot.asked]
    assert ["hello there" in prompt for prompt in prompts] == [True, True, False, False, False, False]
    assert report.bare == ["vidL", "vidM"]
    assert {options["budget"] for _, _, options in parrot.asked} == {"1/2"}
    assert (report.settings["subtitles"], report.settings["budget"]) == (True, "1/2")


def test_settings_say_what_decides_about_the_answers(model: Any, tmp_path: Path) -> None:
    folders.longvideobench(tmp_path)
    folder, benchmark = DataFolder(tmp_path), BENCHMARKS["longvideobench"]

    def settings(of: Any = model, **options: Any) -> dict[str, Any]:
        return run_settings(of, benchmark, folder, benchmark.annotations(folder), RunOptions(**options))

    plain = settings()
    assert plain == settings(make_model())
    assert (plain["benchmark"], plain["prompts"], plain["max_new_tokens"]) == ("longvideobench", benchmark.prompts, 32)
    assert (plain["budget"], plain["dtype"], plain["decoding"]) == ("all", "float32", "greedy")
    assert (plain["temporal_forgetting"], plain["spatial_forgetting"], plain["forgetting_seed"]) == (
        "uniform",
        "uniform",
        0,
    )
    other = settings(make_model(seed=1))
    assert [key for key in plain if plain[key] != other[key]] == ["weights"]
    seeded = settings(make_model(forgetting_seed=3))
    assert [key for key in plain if plain[key] != seeded[key]] == ["forgetting_seed", "config"]
    with torch.no_grad():
        changed = make_model()
        changed.lm_head.weight[0, 0] += 1  # no part of a memory, and yet of the answers
    assert settings(changed)["weights"] != plain["weights"]
    assert settings(budget="60s", subtitles=True, subtitle_frames=32) == plain | {
        "budget": "60s",
        "subtitles": True,
        "subtitle_frames": 32,
    }
    before = plain["annotations"]
    (tmp_path / "lvb_val.json").write_text("[]")
    assert settings()["annotations"].keys() == before.keys() == {"lvb_val.json"}
    assert settings()["annotations"] != before


def test_answers_of_other_settings_are_not_gone_on_with(model: Any, parrot: Parrot, tmp_path: Path) -> None:
    folders.video_mme(tmp_path / "data")
    run(model, tmp_path)
    before = (tmp_path / "answers.jsonl").read_bytes()
    with pytest.raises(HourLlavaError, match=r"given with other settings \(budget\); name another -o, or delete it"):
        run(model, tmp_path, budget="8p")
    with pytest.raises(HourLlavaError, match=r"other settings \(weights\)"):
        run(make_model(seed=1), tmp_path)
    assert (tmp_path / "answers.jsonl").read_bytes() == before


def test_missing_and_unreadable_videos_are_told_and_asked_when_they_come(
    model: Any, parrot: Parrot, tmp_path: Path
) -> None:
    data = folders.video_mme(tmp_path / "data", videos=["vidS"])
    (data / "data/vidL.mp4").write_text("404: not found\n" * 50)
    report = run(model, tmp_path)
    assert report.lost.missing == ["vidM"]
    assert list(report.lost.unreadable) == ["vidL"]
    assert "is not a video" in report.lost.unreadable["vidL"]
    assert (report.available, report.scores.total.asked, report.scores.total.right) == (1, 2, 1)
    assert bool(report.lost)
    told = report.to_dict()
    assert told["videos"] == {"named": 3, "available": 1, "without_subtitles": None}
    assert told["questions"] == {"all": 6, "asked": 2}
    assert told["lost"]["missing"] == ["vidM"]

    folders.write_videos(data / "data", ["vidM", "vidL"])
    parrot.asked.clear()
    report = run(model, tmp_path)
    assert len(parrot.asked) == 4  # and the first two are not asked again
    assert not report.lost
    assert report.scores.total.asked == 6

    (data / "data/vidM.mp4").unlink()  # its answers are there
    assert not run(model, tmp_path).lost


def test_damaged_videos_are_asked_about_what_is_left(model: Any, parrot: Parrot, tmp_path: Path) -> None:
    data = folders.video_mme(tmp_path / "data")
    whole = write_clip(tmp_path / "whole.mp4", list(range(200)), Fraction(1, 10), options={"g": "20"})
    cut(whole, data / "data/vidM.mp4", 0.6)
    for _ in range(2):  # told by a run that finds all answered, too
        report = run(model, tmp_path)
        assert list(report.lost.damaged) == ["vidM"]
        assert report.scores.total.asked == 6
        assert report.available == 3
    records = {record["video"]: record for record in lines(tmp_path / "answers.jsonl")[1:]}
    assert records["vidM"]["seconds"] < 20
    assert records["vidM"]["damage"] == report.lost.damaged["vidM"] != ""


def test_questions_that_cannot_be_asked_are_told(model: Any, tmp_path: Path) -> None:
    data = folders.lvbench(tmp_path / "data")
    document = json.loads((data / "video_info.meta.jsonl").read_text())
    document["qa"][0]["question"] += " <|im_end|>"
    document["qa"][1]["question"] += " word" * 40_000
    document["qa"].append({**document["qa"][1], "uid": "57", "answer": "E"})
    (data / "video_info.meta.jsonl").write_text(json.dumps(document))
    report = run(model, tmp_path, "lvbench")
    assert report.lost.refused.keys() == {"55", "56", "57"}
    assert "its answer, 'E', is none of its choices" in report.lost.refused["57"]
    assert "<|im_end|>" in report.lost.refused["55"]
    assert "tokens" in report.lost.refused["56"]
    assert report.scores.total.accuracy is None


def test_bad_subtitles_are_told(model: Any, parrot: Parrot, tmp_path: Path) -> None:
    data = folders.longvideobench(tmp_path / "data")
    (data / "subtitles/bbb_en.json").write_text("{")
    report = run(model, tmp_path, "longvideobench", subtitles=True)
    assert list(report.lost.unreadable) == ["bbb"]
    assert "its subtitles cannot be read (it is no JSON" in report.lost.unreadable["bbb"]
    assert [prompt.partition("\n")[0] for _, prompt, _ in parrot.asked] == ["take salt"]
    with pytest.raises(DataError, match="LVBench has none; leave that out"):
        run(model, folders.lvbench(tmp_path / "lv/data").parent, "lvbench", subtitles=True)
    (data / "subtitles/aaa_en.json").unlink()
    (data / "subtitles/bbb_en.json").unlink()
    (data / "subtitles.tar").touch()
    with pytest.raises(DataError, match=r"none of the subtitles is in it; subtitles.tar may still have to be unpacked"):
        run(model, tmp_path, "longvideobench", subtitles=True)


def test_no_video_at_all(model: Any, tmp_path: Path) -> None:
    data = folders.video_mme(tmp_path / "data", videos=[])
    (data / "videos_chunked_01.zip").touch()
    with pytest.raises(DataError, match=r"none of the 3 videos is in it; videos_chunked_01.zip may still have to be"):
        run(model, tmp_path)
    assert not (tmp_path / "answers.jsonl").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from benchmark_folders import Parrot
from tiny_model import make_model
from hourllava.evaluate import BENCHMARKS, DataFolder, RunOptions, run_benchmark
from hourllava.model import HourLlavaForConditionalGeneration

bird = Parrot("B")
def ask(*args, **kwargs):
    if len(bird.asked) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return bird(*args, **kwargs)

HourLlavaForConditionalGeneration.ask = ask
root = Path({root!r})
folder, answers = DataFolder(root / "data"), root / "answers.jsonl"
run_benchmark(make_model(), BENCHMARKS["videomme"], folder, root / "memories", answers, RunOptions(), False)
"""


def test_a_run_that_is_killed_goes_on_where_it_stopped(model: Any, parrot: Parrot, tmp_path: Path) -> None:
    folders.video_mme(tmp_path / "data")
    code = KILLED.format(tests=str(Path(__file__).parents[1]), root=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    answers = tmp_path / "answers.jsonl"
    assert len(lines(answers)) == 1 + 3
    with answers.open("a") as file:
        file.write('{"id": "002-2", "vid')  # as if it had been killed while it wrote
    report = run(model, tmp_path)
    assert len(parrot.asked) == 3
    assert [record["id"] for record in lines(answers)[1:]] == ["001-1", "001-2", "002-1", "002-2", "003-1", "003-2"]
    assert report.scores.total.asked == 6


@pytest.mark.parametrize("text", ["hello\n", '{"a": 1}\n', '{"settings": {}}\n[]\n', "[]\n"])
def test_a_file_of_something_else_is_left_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(HourLlavaError, match="it holds something else than answers"):
        AnswerLog(path, {})
    assert path.read_text() == text


def test_one_process_at_a_time_writes_answers(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerLog(path, {"a": (1, 2)}) as log:
        log.add({"id": "x", "reply": "B"})
        with pytest.raises(HourLlavaError, match="another process writes its answers there"):
            AnswerLog(path, {"a": (1, 2)})
    with AnswerLog(path, {"a": (1, 2)}) as log:
        assert log.records == {"x": {"id": "x", "reply": "B"}}


def test_towers_share_a_repository(model: Any, tmp_path: Path) -> None:
    """Each has its own features of a video; a half-watched one is gone on with, whatever another has finished."""
    folders.write_videos(tmp_path, ["film"])
    video, place = tmp_path / "film.mp4", tmp_path / "memories"
    other = make_model(seed=1)
    names = [f"x-film-{FrameWriter(each).tower_fingerprint()[:12]}" for each in (model, other)]

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        WatchedVideos(model, place).memory(video, "x-film", interrupt)
    assert WatchedVideos(other, place).memory(video, "x-film").frames == SECONDS
    assert WatchedVideos(model, place).memory(video, "x-film").frames == SECONDS
    assert [video.name for video in Repository(place).videos()] == sorted(names)
    assert {video.frames for video in Repository(place).videos()} == {SECONDS}


def test_a_memory_that_is_damaged_or_being_watched_is_told(model: Any, tmp_path: Path) -> None:
    folders.write_videos(tmp_path, ["film"])
    video, watched = tmp_path / "film.mp4", WatchedVideos(model, tmp_path / "memories")
    watched.memory(video, "film")
    (held,) = watched.repository.videos()
    folder = tmp_path / "memories" / held.name
    (segment,) = watched.repository.catalogue.segments(held.name)
    os.truncate(folder / segment.file, 10)
    with pytest.raises(VideoError, match=r"its memory, .*, cannot be read \(it is damaged.*; run `hourllava"):
        watched.memory(video, "film")
    watched.repository.delete(held.name)
    writer = watched.repository.add(held.name, FrameWriter(model), source=str(video))
    with pytest.raises(VideoError, match="another process watches it just now"):
        watched.memory(video, "film")
    writer.close()
    assert watched.memory(video, "film").frames == SECONDS


def test_what_embed_has_watched_is_not_watched_again(
    model: Any, parrot: Parrot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless its features are rounded to eight bits, which the settings of a run do not say."""
    data = folders.video_mme(tmp_path / "data")
    writer, size = FrameWriter(model), model.config.vision_config.image_size
    for place, precision in [("rounded", "int8"), ("memories", "bfloat16")]:
        for job in list_jobs(data):
            assert take_in(job, Repository(tmp_path / place), writer, size, precision).state == "done"
    WatchedVideos(model, tmp_path / "rounded").memory(data / "data/vidS.mp4", "videomme-vidS")
    held = Repository(tmp_path / "rounded").videos()
    assert sorted(video.precision for video in held) == ["bfloat16", "int8", "int8", "int8"]
    watching_is_an_error(model, monkeypatch)
    assert not run(model, tmp_path).lost
    assert len(Repository(tmp_path / "memories").videos()) == 3


@pytest.mark.parametrize("name", ["tempcompass", "longvideobench", "lvbench"])
def test_the_model_itself_answers(name: str, model: Any, tmp_path: Path) -> None:
    """A model of random weights: what it says is nonsense, and the same each time."""
    getattr(folders, name)(tmp_path / "data")
    report = run(model, tmp_path, name)
    first = (tmp_path / "answers.jsonl").read_bytes()
    assert report.scores.total.asked == report.questions > 0
    assert not report.lost
    (tmp_path / "answers.jsonl").unlink()
    assert run(model, tmp_path, name).to_dict() == report.to_dict()
    assert (tmp_path / "answers.jsonl").read_bytes() == first
