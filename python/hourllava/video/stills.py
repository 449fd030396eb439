# SPDX-License-Identifier: Apache-2.0
"""Single pictures of a video, found without decoding what lies between them."""

import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import numpy as np
from av.video.frame import VideoFrame

from hourllava.errors import VideoError
from hourllava.video.clock import clock
from hourllava.video.decoder import Decoder
from hourllava.video.plan import Plan, make_plan


def stills(path: str | os.PathLike[str], seconds: Sequence[int], box: tuple[int, int]) -> list[np.ndarray]:
    """The pictures that `VideoReader` gives for some seconds, in the video's own shape.

    Each is decoded from the key picture before it; where that cannot be told, or the file is damaged, from the start.

    Args:
        path: the video file.
        seconds: counted from the first picture, in any order.
        box: most rows and columns of a picture; larger ones are shrunk, smaller ones stay as they are.

    Returns:
        (H, W, 3) uint8 RGB for each second, upright.

    Raises:
        VideoError: the file cannot be read, or ends before one of the seconds.
    """
    plan = _plan_of(path)
    last = max(seconds, default=0)
    if last >= len(plan.targets):
        why = f"it ends at {clock(len(plan.targets))} and has no picture for {clock(last)}"
        raise VideoError(path, why, "give the video that was watched")
    found: dict[int, np.ndarray] = {}
    for cut, group in groupby(sorted(set(seconds)), key=lambda second: _cut_before(plan, second)):
        wanted = list(group)
        # As the reader does: what is damaged shows the last good picture; a file full of errors is its encoder's habit.
        for begin, strict in ((cut, True), (None, True), (None, False)):
            pictures = _decode(Decoder(path, plan, strict), begin, wanted, box)
            if len(pictures) == len(wanted):
                break
        else:
            raise VideoError(path, "not one picture could be decoded", "check that it plays, or convert it to MP4")
        found |= pictures
    return [found[second] for second in seconds]


def _plan_of(path: str | os.PathLike[str]) -> Plan:
    """A file's plan, which takes reading all of its index; that of the last few files is kept while they stay the same.

    Raises:
        VideoError: it cannot be read.
    """
    try:
        status = os.stat(path)
    except OSError:
        return make_plan(path)  # which says what is wrong with it
    return _kept_plan(os.path.abspath(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=8)
def _kept_plan(path: str, size: int, changed: int) -> Plan:
    return make_plan(path)


def _cut_before(plan: Plan, second: int) -> int | None:
    """Where decoding can begin for the picture of a second; None is the start of the file."""
    number = int(np.searchsorted(plan.cuts, plan.chosen[second], side="right"))
    return int(plan.cuts[number - 1]) if number else None


def _decode(decoder: Decoder, begin: int | None, wanted: list[int], box: tuple[int, int]) -> dict[int, np.ndarray]:
    """Pictures of ascending seconds, without those for which nothing came out."""
    targets, pictures, shown = decoder.plan.targets, dict[int, np.ndarray](), None
    try:
        for frame in decoder.pictures(begin):
            if shown is None and begin is None:
                shown = frame  # the first sound picture stands in for damaged ones before it
            while len(pictures) < len(wanted) and targets[wanted[len(pictures)]] < (frame.pts or 0):
                if shown is None:
                    return {}
                pictures[wanted[len(pictures)]] = _upright(shown, box)
            if len(pictures) == len(wanted):
                return pictures
            shown = frame
    finally:
        decoder.close()
    if shown is not None:
        pictures |= {second: _upright(shown, box) for second in wanted[len(pictures) :]}
    return pictures


def _upright(frame: VideoFrame, box: tuple[int, int]) -> np.ndarray:
    turns = round(frame.rotation / 90)  # counter-clockwise
    height, width = box if turns % 2 == 0 else box[::-1]
    share = min(1.0, height / frame.height, width / frame.width)
    size = {"width": max(1, round(frame.width * share)), "height": max(1, round(frame.height * share))}
    return np.rot90(frame.reformat(**size, format="rgb24", interpolation="AREA").to_ndarray(), turns)
