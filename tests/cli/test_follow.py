# SPDX-License-Identifier: Apache-2.0
"""`hourllava watch --follow`: the memory of a file that grows, asked meanwhile, and ended by a signal."""

import os
import signal
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from clips import write_clip

from hourllava.cli import main
from hourllava.memory import Repository, VideoMemory, verify

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
