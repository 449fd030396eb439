# SPDX-License-Identifier: Apache-2.0
"""`hourllava watch --follow`: the memory of a file that grows, asked meanwhile, and ended by a signal."""

import os
import signal
import socket
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from cameras import Camera, Http, Rtsp, serving
from clips import cut, write_clip

from hourllava.cli import main
from hourllava.memory import Repository, VideoMemory, verify
from hourllava.model import FrameWriter, load_model
from hourllava.video import open_video

SECONDS = 40


@pytest.fixture
def film(tmp_path: Path) -> bytes:
    path = write_clip(tmp_path / "film.ts", range(10 * SECONDS), Fraction(1, 10), options={"g": "20"})
    return path.read_bytes()


def assert_same(ours: VideoMemory, theirs: VideoMemory) -> None:
    assert torch.equal(ours.tokens, theirs.tokens)
    inside = torch.arange(128) < ours.page_lengths[:, None]
    for a, b in zip(ours.pages, theirs.pages, strict=True):
        assert torch.equal(a.key_pages.transpose(1, 2)[inside], b.key_pages.transpose(1, 2)[inside])
        assert torch.equal(a.key_summary, b.key_summary)


def test_a_growing_file_is_watched_as_the_whole_one(
    film: bytes, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live, growing, whole = tmp_path / "live.ts", tmp_path / "growing.memory", tmp_path / "whole.memory"
    live.touch()

    def write() -> None:
        with live.open("ab", buffering=0) as file:
            for first in range(0, len(film), 7001):
                file.write(film[first : first + 7001])
                time.sleep(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    assert main(["watch", str(live), "--follow", "--idle", "3", "-o", str(growing), "--model", model]) == 0
    writer.join()
    assert f"the memory of 00:{SECONDS} of {live}" in capsys.readouterr().out
    assert main(["watch", str(tmp_path / "film.ts"), "-o", str(whole), "--model", model]) == 0
    ours = VideoMemory.load(growing)
    assert_same(ours, VideoMemory.load(whole))
    assert ours.source == str(live)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_the_memory_stays(
    number: signal.Signals, film: bytes, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live, place, before = tmp_path / "live.ts", tmp_path / "memories", signal.getsignal(number)
    live.write_bytes(film[: len(film) // 2])
    seen: list[int] = []
    told: list[int] = []

    def ask_and_stop() -> None:
        repository = Repository(place)
        while not seen or not seen[-1]:
            time.sleep(0.05)
            if repository.videos():
                seen.append(repository.open("live").frames)  # as another process would
        told.append(number)
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask_and_stop)
    asking.start()
    options = ["--follow", "--idle", "100", "--into", str(place), "--pages", "--model", model]
    assert main(["watch", str(live), *options]) == 0
    asking.join()
    assert told == [number]
    assert signal.getsignal(number) == before
    assert "of it new" in capsys.readouterr().out
    repository = Repository(place)
    assert repository.videos()[0].frames >= seen[-1] > 0
    assert verify(repository, "live") == []
    # What was missing when it stopped is gone on with, and the memory is that of the whole file.
    live.write_bytes(film)
    assert main(["watch", str(live), "--into", str(place), "--model", model]) == 0
    assert main(["watch", str(tmp_path / "film.ts"), "--into", str(place), "--pages", "--model", model]) == 0
    assert_same(repository.open("live"), repository.open("film"))


def test_a_camera_that_went_away_is_gone_on_with(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The same command twice: what came before is there, and what comes then stands behind it."""
    options = {"g": "20", "bf": "2"}
    films = [
        write_clip(tmp_path / f"{step}.ts", range(0, 90 * step, step), Fraction(1, 10), options=options)
        for step in (1, 2)
    ]
    place = tmp_path / "memories"
    with serving(Camera(Rtsp, *films)) as port:
        command = ["watch", f"rtsp://me:secret@127.0.0.1:{port}/1", "--follow", "--into", str(place), "--name", "door"]
        for new, seconds in ((9, 9), (18, 27)):
            assert main([*command, "--model", model]) == 0
            out, err = capfd.readouterr()
            assert (
                f"00:{seconds:02} of rtsp://127.0.0.1:{port}/1, 00:{new:02} of it new; the other side ended it" in out
            )
            assert (err, "secret" in out) == ("", False)
            assert verify(Repository(place), "door") == []
    watcher = load_model(model)
    frames = [chunk.frames for path in films for chunk in open_video(path).chunks(64)]
    both = Repository(place).add("both", FrameWriter(watcher))
    watcher.watch(torch.cat(frames), progress=False, into=both)
    assert_same(Repository(place).open("door", FrameWriter(watcher), append=False), both)


def test_a_connection_that_breaks(film: bytes, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "film.ts").write_bytes(film)
    half, place = cut(tmp_path / "film.ts", tmp_path / "half.ts", 0.5), tmp_path / "memories"
    with serving(Camera(Http, half, promised=len(film))) as port:
        address = f"http://127.0.0.1:{port}/1"
        command = ["watch", address, "--follow", "--into", str(place), "--name", "door", "--model", model]
        assert main(command) == 3
        out, err = capfd.readouterr()
        held = Repository(place).videos()[0].frames
        assert SECONDS // 4 < held < SECONDS
        assert "of it new; it broke off (" in out
        assert err.startswith(f"hourllava: {address}: it broke off (")
        assert err.endswith("what came is kept, with --into the same command goes on with it\n")
        assert err.count("\n") == 1
        assert main(command) == 3
    assert Repository(place).videos()[0].frames == 2 * held
    assert verify(Repository(place), "door") == []


def test_nobody_answers(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One line, and no empty video in the repository."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"rtsp://127.0.0.1:{server.getsockname()[1]}/1"
        place = ["--into", str(tmp_path / "memories"), "--name", "door"]
        assert main(["watch", address, "--follow", "--idle", "1", *place, "--model", model]) == 1
    out, err = capfd.readouterr()
    why = "nothing came within 1 s; check the address, and that it is sending"
    assert (out, err) == ("", f"hourllava: {address}: {why}\n")
    assert Repository(tmp_path / "memories").videos() == []


def test_what_cannot_be_followed(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    address = "rtsp://camera.example/1"
    for arguments, why in [
        ([address, "-o", str(tmp_path / "a.memory")], "it is an address and no file; add --follow"),
        ([address, "--follow", "--into", str(tmp_path)], "add --name"),
        ([str(tmp_path / "no.ts"), "--follow", "-o", str(tmp_path / "a.memory")], "No such file"),
    ]:
        assert main(["watch", *arguments, "--model", model]) == 1
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert why in err
    assert not list(tmp_path.iterdir())
