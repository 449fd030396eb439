# SPDX-License-Identifier: Apache-2.0
"""However many cores decode, and wherever the file is cut for them, no pixel changes."""

import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from clips import SIDE, damage, number_on, write_clip
from tiny_model import make_model

import hourllava.video.runs as runs_module
from hourllava.memory import VideoMemory
from hourllava.model import watching
from hourllava.video import open_video
from hourllava.video.plan import make_plan

SECONDS = 40
X264 = {"preset": "veryfast", "bf": "3", "g": "20", "keyint_min": "20"}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def decode_threads() -> bool:
    return any(thread.name.startswith("decode") for thread in threading.enumerate())


def everything(path: Path, segment: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, object]:
    """All frames and the report, from cuts at least ``segment`` seconds apart."""
    monkeypatch.setattr(runs_module, "SEGMENT", segment)
    torch.set_num_threads(threads)
    reader = open_video(path)
    return torch.cat([chunk.frames for chunk in reader.chunks(SIDE)]), reader.report


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_cores_change_no_pixel(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_clip(tmp_path / f"clip.{suffix}", list(range(10 * SECONDS)), Fraction(1, 10), options=X264)
    assert len(make_plan(clip).cuts) == SECONDS // 2 - 1
    whole = everything(clip, 10 * SECONDS, 1, monkeypatch)
    for threads in (1, 2, 3):
        frames, report = everything(clip, 3, threads, monkeypatch)
        assert torch.equal(frames, whole[0])
        assert report == whole[1]


@pytest.mark.skipif("libsvtav1" not in av.codecs_available, reason="NO AV1 ENCODER: cuts in AV1 are NOT TESTED")
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_cores_change_no_pixel_of_av1(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"preset": "8", "svtav1-params": "keyint=40"}
    clip = write_clip(tmp_path / f"clip.{suffix}", list(range(240)), Fraction(1, 10), "libsvtav1", options)
    assert len(make_plan(clip).cuts) == 5
    whole, report = everything(clip, 1000, 1, monkeypatch)
    assert [number_on(frame) for frame in whole] == [10 * k for k in range(24)]
    frames, again = everything(clip, 3, 2, monkeypatch)
    assert torch.equal(frames, whole)
    assert again == report


@pytest.mark.skipif("libsvtav1" not in av.codecs_available, reason="NO AV1 ENCODER: cuts in AV1 are NOT TESTED")
def test_no_cut_where_av1_looks_back(tmp_path: Path) -> None:
    """A key picture that is decoded before pictures that are shown earlier is none that decoding can begin at."""
    options = {"preset": "8", "svtav1-params": "keyint=40:irefresh-type=1"}
    clip = write_clip(tmp_path / "clip.mp4", list(range(240)), Fraction(1, 10), "libsvtav1", options)
    assert len(make_plan(clip).cuts) == 0


def test_damage_is_counted_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_clip(tmp_path / "whole.mp4", list(range(10 * SECONDS)), Fraction(1, 10), options=X264)
    clip = damage(whole, tmp_path / "damaged.mp4", size=2000)
    frames, report = everything(clip, 10 * SECONDS, 1, monkeypatch)
    assert report.damaged > 0
    split, again = everything(clip, 3, 2, monkeypatch)
    assert torch.equal(split, frames)
    assert again == report


@pytest.mark.parametrize("habit", [{"x264-params": "open-gop=1"}, {"x264-params": "intra-refresh=1"}])
def test_no_cut_where_a_picture_looks_back(
    tmp_path: Path, habit: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = write_clip(tmp_path / "clip.mp4", list(range(10 * SECONDS)), Fraction(1, 10), options=X264 | habit)
    assert not len(make_plan(clip).cuts)
    frames, _ = everything(clip, 3, 2, monkeypatch)
    assert torch.equal(frames, everything(clip, 10 * SECONDS, 1, monkeypatch)[0])


def test_a_reader_that_is_left_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_clip(tmp_path / "clip.mp4", list(range(10 * SECONDS)), Fraction(1, 10), options=X264)
    monkeypatch.setattr(runs_module, "SEGMENT", 3)
    monkeypatch.setattr(runs_module, "PICTURES_AHEAD", 1)
    torch.set_num_threads(3)
    chunks = open_video(clip).chunks(SIDE, chunk=2)
    next(chunks)
    assert decode_threads()
    chunks.close()
    assert not decode_threads()


def test_a_watching_that_fails_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even while its error, which holds the calls that it came from, is kept."""
    clip = write_clip(tmp_path / "clip.mp4", list(range(10 * SECONDS)), Fraction(1, 10), options=X264)
    monkeypatch.setattr(runs_module, "SEGMENT", 3)
    monkeypatch.setattr(runs_module, "PICTURES_AHEAD", 1)
    monkeypatch.setattr(watching, "CHUNK", 2)
    torch.set_num_threads(3)
    model, decoding = make_model(), list[bool]()

    def fail(memory: VideoMemory) -> None:
        decoding.append(decode_threads())
        raise OSError("no space")

    with pytest.raises(OSError, match="no space") as kept:
        model.watch(clip, progress=False, on_chunk=fail)
    assert decoding == [True]
    assert not decode_threads()
    monkeypatch.setattr(VideoMemory, "append", lambda memory, frames: fail(memory))
    with pytest.raises(OSError, match="no space") as again:
        model.watch(clip, progress=False)
    assert decoding == [True, True]
    assert not decode_threads()
    assert kept.value is not again.value
