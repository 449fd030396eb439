# SPDX-License-Identifier: Apache-2.0
"""A video as a folder of its frames, as some data sets keep them."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hourllava.errors import VideoError
from hourllava.video.reader import FrameChunk, ReadReport
from hourllava.video.resize import resize_frames

PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
_DIGITS = 6  # of a time or a frame's number that count: 100 x 0.29 is 29, whatever floating point makes of it


class FrameFolder:
    """What `VideoReader` is for a file: for second k, the last frame at or before it.

    Args:
        path: a folder whose pictures are the frames, in the order of their names; what is no picture is passed over.
        fps: frames a second.

    Raises:
        VideoError: it holds no picture, or cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float = 1.0) -> None:
        self.path, self.fps = os.fspath(path), fps
        try:
            self._files = sorted(file for file in Path(path).iterdir() if file.suffix.lower() in PICTURES)
        except OSError as error:
            raise VideoError(path, f"it cannot be read ({error.strerror})", "check its permissions") from error
        if not self._files:
            todo = f"name a video file, or a folder of frames ({', '.join(sorted(PICTURES))})"
            raise VideoError(path, "is a directory and holds no pictures", todo)
        self._given = 0

    @property
    def duration(self) -> float:
        """Seconds of video that the frames make."""
        return len(self._files) / self.fps

    @property
    def frames_expected(self) -> int:
        """How many pictures :meth:`chunks` gives in all."""
        return max(1, math.ceil(round(self.duration, _DIGITS)))

    @property
    def report(self) -> ReadReport:
        """What was read so far; nothing is ever lost, for a frame that cannot be read is an error."""
        return ReadReport(self._given, self.duration, min(self.duration, float(self._given)), 0, None)

    def chunks(self, size: int, chunk: int = 32) -> Iterator[FrameChunk]:
        """Up to ``chunk`` seconds at a time, as (n, 3, size, size) uint8; only the last may be shorter.

        Raises:
            VideoError: a frame is no picture.
        """
        self._given = 0
        for first in range(0, self.frames_expected, chunk):
            seconds = range(first, min(first + chunk, self.frames_expected))
            files = (self._files[int(round(second * self.fps, _DIGITS))] for second in seconds)
            frames = torch.stack([self._frame(file, size) for file in files])
            self._given += len(frames)
            yield FrameChunk(frames, torch.arange(seconds.start, seconds.stop).double())

    def _frame(self, file: Path, size: int) -> Tensor:
        try:
            with Image.open(file) as opened:
                pixels = np.array(opened.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as PIL has them
            why = f"it is no picture that can be read ({error})"
            raise VideoError(file, why, "get an intact copy, or leave the video out") from error
        return resize_frames(torch.from_numpy(pixels).permute(2, 0, 1)[None], size)[0]
