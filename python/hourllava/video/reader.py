# SPDX-License-Identifier: Apache-2.0
"""Read a video at one picture per second, in chunks, with memory that does not grow with its length."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hourllava.errors import VideoError
from hourllava.video.clock import clock
from hourllava.video.plan import CUT_TOLERANCE, GONE, Plan, make_plan
from hourllava.video.runs import Run, runs


@dataclass(frozen=True)
class FrameChunk:
    """Consecutive seconds of a video."""

    frames: Tensor  # (n, 3, size, size) uint8 RGB
    seconds: Tensor  # (n,) float64, from the first picture


@dataclass(frozen=True)
class ReadReport:
    """What could be read of a video."""

    frames: int  # pictures given out, one per second
    seconds_expected: float  # by the file's header
    seconds_read: float  # covered by pictures that were really decoded
    damaged: int  # seconds that show the last good picture because their own is damaged
    message: str | None  # one line if anything was lost


class VideoReader:
    """One picture per second of a video file: for second k, the last with timestamp <= start + k.

    This is exact for constant and variable frame rates, edit lists and start offsets. A damaged or cut file gives what
    can be read: from an error to the next key picture the last good picture stays on screen, so that time stays right,
    and :attr:`report` counts those seconds.

    Args:
        path: the video file.
        plan: which picture stands for each second, if that has been read already.

    Raises:
        VideoError: the path is no readable video; the one line says why and what to do.
    """

    def __init__(self, path: str | os.PathLike[str], plan: Plan | None = None) -> None:
        self.path = os.fspath(path)
        self._plan: Plan = plan or make_plan(path)
        self._given = self._damaged = 0

    @property
    def duration(self) -> float:
        """Seconds of video that the file holds."""
        return self._plan.seconds

    @property
    def frames_expected(self) -> int:
        """How many pictures :meth:`chunks` gives in all."""
        return len(self._plan.targets)

    @property
    def report(self) -> ReadReport:
        """What was read so far; complete after :meth:`chunks` has been exhausted."""
        plan = self._plan
        read = max(0.0, min(plan.seconds, float(self._given)) - self._damaged)
        return ReadReport(self._given, plan.seconds_expected, read, self._damaged, self._message())

    def chunks(self, size: int, chunk: int = 32) -> Iterator[FrameChunk]:
        """Decode from the start and yield up to ``chunk`` seconds at a time; only the last chunk may be shorter.

        Args:
            size: side of the square pictures.
            chunk: seconds per chunk.

        Raises:
            VideoError: not one picture could be decoded, or the file is gone.
        """
        self._given = self._damaged = 0
        frames: list[Tensor] = []
        for picture in self._each_second(size):
            frames.append(picture)
            self._given += 1
            if len(frames) == chunk or self._given == self.frames_expected:
                yield FrameChunk(torch.stack(frames), self._given - len(frames) + torch.arange(len(frames)).double())
                frames = []

    def _each_second(self, size: int) -> Iterator[Tensor]:
        """Yield (3, size, size) uint8 for every second, repeating the picture that stays on screen."""
        k = 0
        last: Run | None = None  # on screen until the next, whenever that is
        for run in self._runs(size):
            if last is not None:
                yield from self._repeat(last, self._plan.chosen[k : run.first])
                k = max(k, run.first)
            if run.until is not None:
                yield from self._repeat(run, self._plan.chosen[k : run.until])
                k = max(k, run.until)
            last = run if run.until is None else None
        if last is None:
            raise VideoError(self.path, "not one picture could be decoded", "check that it plays, or convert it to MP4")
        yield from self._repeat(last, self._plan.chosen[k:])

    def _repeat(self, run: Run, chosen: np.ndarray) -> Iterator[Tensor]:
        """Give the picture for each of these seconds; where another was chosen, that one was lost to damage."""
        for time in chosen.tolist():
            self._damaged += time == GONE or (run.can_miss and time != run.time)
            yield run.picture

    def _runs(self, size: int) -> Iterator[Run]:
        nothing = True
        for run in runs(self.path, self._plan, size, strict=True):
            nothing = False
            yield run
        if nothing:
            # Where even the first key picture breaks the rules, that is this encoder's habit and not damage.
            yield from runs(self.path, self._plan, size, strict=False)

    def _message(self) -> str | None:
        plan, lost = self._plan, []
        promised = plan.seconds_expected - plan.jumped
        if promised - plan.seconds > CUT_TOLERANCE:
            lost.append(f"the file ends at {clock(plan.seconds)} of {clock(promised)}")
        if plan.jumped:
            lost.append(f"{plan.jumped:.0f} s have no time of their own, since the clock in the file jumps")
        if self._damaged:
            lost.append(f"{self._damaged} s are damaged and show the last good picture before them")
        if not lost:
            return None
        total = max(1, round(plan.seconds_expected - plan.seconds + self._damaged))
        todo = "convert it to MP4 (ffmpeg -i IN OUT.mp4)" if plan.jumped else "get an intact copy"
        return (
            f"{self.path}: {total} of {plan.seconds_expected:.0f} seconds are lost, {' and '.join(lost)}; "
            f"{todo} to use all of it"
        )
