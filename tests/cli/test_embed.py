# SPDX-License-Identifier: Apache-2.0
"""`hourllava embed`: a data set's features in a repository, whatever happens on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from clips import CLIP_SECONDS, cut, write_clip
from memories import full_disk

from hourllava.cli import main
from hourllava.data.mixture import load_mixture
from hourllava.data.shards import ShardDataset
from hourllava.memory import Repository, packed_features, verify
from hourllava.model import FrameWriter, load_model

QUESTION = "Which colour was the star?"
LONG = 300  # seconds: more than one commit


@pytest.fixture(scope="session")
def long_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of five minutes, a picture a second."""
    folder = tmp_path_factory.mktemp("long")
    for number in range(2):
        write_clip(folder / f"{number}.mp4", list(range(LONG)), Fraction(1))
    return folder


def run(*arguments: object, capfd: pytest.CaptureFixture[str], code: int = 0) -> str:
    assert main(["embed", *map(str, arguments)]) == code
    return "".join(capfd.readouterr())


def features(folder: Path) -> dict[str, torch.Tensor]:
    repository = Repository(folder)
    return {video.name: packed_features(repository, video.name)["features"] for video in repository.videos()}


def test_a_folder(clip: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    films, out, options = tmp_path / "films", tmp_path / "features", ["--model", model]
    (films / "a").mkdir(parents=True)
    (films / "film.mp4").symlink_to(clip)
    (films / "a" / "same.mp4").symlink_to(clip)
    (films / "text.mkv").write_text("Dear diary.\n" * 100)
    cut(Path(clip), films / "short.mp4", 0.7)
    said = run(films, "-o", out, *options, capfd=capfd, code=1)
    assert "2 embedded, 1 failed" in said
    assert "bfloat16: " in said
    assert "kB a second" in said
    lines = said.splitlines()
    assert any(line.startswith("text.mkv: failed: ") and "is not a video" in line for line in lines)
    assert any(line.startswith("short.mp4: done: ") and "seconds are lost" in line for line in lines)
    held = features(out)
    assert sorted(held) == ["a%2Fsame.mp4", "film.mp4", "short.mp4"]
    assert torch.equal(held["film.mp4"], held["a%2Fsame.mp4"])  # embedded once
    files = [next((out / name).glob("features-*")) for name in ("film.mp4", "a%2Fsame.mp4")]
    assert files[0].samefile(files[1])

    (films / "text.mkv").unlink()
    stamp = files[0].stat().st_mtime_ns
    assert "2 there already" in run(films, "-o", out, *options, capfd=capfd)  # and nothing is said of them again
    assert files[0].stat().st_mtime_ns == stamp

    answers = []
    for source in (clip, out / "film.mp4"):
        assert main(["ask", str(source), QUESTION, "--json", *options]) == 0
        answers.append(json.loads(capfd.readouterr().out)["answers"][0]["mass"])
    assert answers[1] == pytest.approx(answers[0], abs=0.01)


def test_a_name_of_other_bytes_stops_nothing(
    clip: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / os.fsdecode(b"a\xff.mp4")).write_bytes(Path(clip).read_bytes())
    (tmp_path / "films" / "film.mp4").symlink_to(clip)
    said = run(tmp_path / "films", "-o", tmp_path / "out", "--model", model, capfd=capfd, code=1)
    assert "1 embedded, 1 failed" in said
    assert "the catalogue can hold only paths in UTF-8; rename the file" in said
    assert sorted(features(tmp_path / "out")) == ["film.mp4"]


def test_eight_bits_take_about_half_the_room(
    clip: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(f"# films\n{clip}\n\n{os.path.relpath(clip, tmp_path)}\n")
    sizes = []
    for precision in ("bfloat16", "int8"):
        out = tmp_path / precision
        said = run(listed, "-o", out, "--precision", precision, "--model", model, capfd=capfd)
        assert f"{precision}: 00:{CLIP_SECONDS} of 1 videos" in said
        assert len(Repository(out).videos()) == 2  # one video by two names
        sizes.append(float(said.split(" kB a second")[0].split()[-1]))
    # The tiny model's features are narrow, so that the scale of each token weighs.
    assert sizes[1] < 0.8 * sizes[0]


def test_a_manifest(clip: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    films = tmp_path / "media" / "youcook2"
    films.mkdir(parents=True)
    (films / "film.mp4").symlink_to(clip)
    rows = [{"id": i, "video": "film.mp4", "data_source": "youcook2", "conversations": turns} for i in range(3)]
    (tmp_path / "data.json").write_text(json.dumps([*rows, {"id": 9, "conversations": turns}]))
    (tmp_path / "data.yaml").write_text("media_root: media\nfeatures: out\ndatasets:\n  - json_path: data.json\n")
    out = tmp_path / "out"
    assert "1 embedded" in run(tmp_path / "data.yaml", "-o", out, "--model", model, capfd=capfd)
    sample = load_mixture(tmp_path / "data.yaml")[0]
    assert sample.media[0].path == out / "youcook2%2Ffilm.mp4"  # training looks for it where it is
    assert sample.media[0].path.is_dir()

    arguments = ["shards", str(tmp_path / "data.yaml"), "-o", str(tmp_path / "shards")]
    assert main(arguments) == 0
    assert "4 samples in 1 shards" in capfd.readouterr().out
    held = ShardDataset(tmp_path / "shards")[2].held[0]
    assert held is not None
    assert torch.equal(held.content, features(out)["youcook2%2Ffilm.mp4"])
    assert main(arguments) == 1
    assert "holds shards already" in capfd.readouterr().err


def test_ranks_share_the_work(clip: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    films, out = tmp_path / "films", tmp_path / "features"
    films.mkdir()
    for name in "abc":
        (films / f"{name}.mp4").write_bytes(Path(clip).read_bytes())
    for rank, count in ((0, 2), (1, 1)):
        options = ["--rank", rank, "--world", 2, "--model", model]
        assert f"{count} embedded" in run(films, "-o", out, *options, capfd=capfd)
    assert sorted(features(out)) == ["a.mp4", "b.mp4", "c.mp4"]


def start(folder: Path, out: Path, model: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "hourllava", "embed", folder, "-o", out, "--model", model, "--processes", "2"]
    return subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def committed(out: Path) -> int:
    return sum(video.frames for video in Repository(out).videos()) if Repository.is_at(out) else 0


def wait_for(true: object, process: subprocess.Popen) -> None:
    while not true():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


def segments(folder: Path) -> set[Path]:
    """The files that the catalogue counts; one may be there already that it does not count yet."""
    repository = Repository(folder)
    return {folder / v.name / s.file for v in repository.videos() for s in repository.catalogue.segments(v.name)}


def test_killed_and_gone_on_with(
    long_clips: Path, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "features"
    process = start(long_clips, out, model)
    wait_for(lambda: committed(out) > 0, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {segment: segment.stat().st_mtime_ns for segment in segments(out)}
    held = committed(out)
    assert 0 < held < 2 * LONG

    process = start(long_clips, out, model)  # the same command again, of which only one process is killed
    wait_for(lambda: len(psutil.Process(process.pid).children()) >= 2, process)
    spawned = [p for p in psutil.Process(process.pid).children() if "resource_tracker" not in " ".join(p.cmdline())]
    spawned[0].kill()
    said = process.communicate()[0]
    assert process.returncode == 1
    assert "it was killed (signal 9); run the same command again" in said
    assert "Traceback" not in said
    assert committed(out) > held

    run(long_clips, "-o", out, "--model", model, capfd=capfd)
    whole = tmp_path / "whole"
    run(long_clips, "-o", whole, "--model", model, capfd=capfd)
    ours, expected = features(out), features(whole)
    assert ours.keys() == expected.keys() == {"0.mp4", "1.mp4"}
    for name in ours:
        assert torch.equal(ours[name], expected[name])
        assert verify(Repository(out), name) == []
    assert before.keys() <= segments(out)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())  # nothing committed was done again


def refused(*arguments: object, capfd: pytest.CaptureFixture[str]) -> str:
    assert main(["embed", *map(str, arguments)]) == 1
    err = capfd.readouterr().err
    assert err.startswith("hourllava: ")
    assert err.count("\n") == 1
    return err


def test_what_cannot_be_embedded(
    clip: str, model: str, other_model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "features", ["--model", model]
    assert "no such file" in refused(tmp_path / "absent", "-o", out, *options, capfd=capfd)
    (tmp_path / "films").mkdir()
    assert "names no video" in refused(tmp_path / "films", "-o", out, *options, capfd=capfd)
    (tmp_path / "films" / "film.mp4").symlink_to(clip)
    (tmp_path / "list.txt").write_bytes(b"\xff\xfef\x00i\x00l\x00m\x00")
    assert "it is no text; give a list of videos" in refused(tmp_path / "list.txt", "-o", out, *options, capfd=capfd)
    for wrong in (["--processes", 0], ["--rank", 2, "--world", 2], ["--world", 0]):
        assert "do not fit" in refused(tmp_path / "films", "-o", out, *wrong, *options, capfd=capfd)
    assert "no such model" in refused(tmp_path / "films", "-o", out, "--model", tmp_path / "absent", capfd=capfd)
    run(tmp_path / "films", "-o", out, *options, capfd=capfd)
    said = run(tmp_path / "films", "-o", out, "--model", other_model, capfd=capfd, code=1)
    assert "film.mp4: failed: " in said
    assert "another vision tower" in said
    run(tmp_path / "films", "-o", out, *options, capfd=capfd)  # with the right one it is there, as before
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "film.mp4").write_bytes(Path(clip).read_bytes())
    said = run(tmp_path / "others", "-o", out, *options, capfd=capfd, code=1)
    assert "the repository calls another video film.mp4" in said


def test_full_disk(long_clips: Path, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, options = tmp_path / "features", ["--model", model]
    Repository(out)
    with full_disk(64_000):
        assert main(["embed", str(long_clips), "-o", str(out), *options]) == 1
    assert "free some space" in capfd.readouterr().err
    assert all(not verify(Repository(out), video.name) for video in Repository(out).videos())


def test_import(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The original's files: 16 tokens of 32 channels in place of 64 of 1152."""
    shape = FrameWriter(load_model(model))
    tokens, width = shape.shape.per_frame, shape.feature_width
    folder, out = tmp_path / "features", tmp_path / "out"
    (folder / "youcook2").mkdir(parents=True)
    whole = torch.randn(300, tokens, width)
    torch.save({"vid_feat": whole, "duration": 300.4}, folder / "youcook2" / "long.pt")
    torch.save({"vid_feat": whole[:128], "duration": 50.0}, folder / "short.pt")
    torch.save({"vid_feat": whole[..., :5].clone(), "duration": 300.0}, folder / "tower.pt")
    torch.save({"vid_feat": whole.clone().fill_(float("nan")), "duration": 300.0}, folder / "nan.pt")
    said = run(folder, "-o", out, "--import", "--model", model, capfd=capfd, code=1)
    assert "2 embedded, 2 failed" in said
    assert "another tower made these features" in next(x for x in said.splitlines() if x.startswith("tower.pt"))
    assert "no numbers" in next(x for x in said.splitlines() if x.startswith("nan.pt"))
    held = features(out)
    assert sorted(held) == ["short.mp4", "youcook2%2Flong.mp4"]
    assert torch.equal(held["youcook2%2Flong.mp4"], whole.bfloat16())
    assert torch.equal(held["short.mp4"], whole[np.linspace(0, 127, 50, dtype=int)].bfloat16())
    assert main(["ask", str(out / "short.mp4"), QUESTION, "--model", model]) == 0
