# SPDX-License-Identifier: Apache-2.0
"""Small video files whose every picture tells its own number."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor

SIDE = 64
CLIP_SECONDS = 20  # of the clip that fixtures give
CELLS = 4  # the picture is a 4 x 4 board, white for a one: a 16-bit number that survives any codec and resize


def board(number: int, side: int = SIDE) -> np.ndarray:
    """(side, side, 3) uint8 picture of a number below 65536."""
    bits = np.array([number >> i & 1 for i in range(CELLS * CELLS)], dtype=np.uint8).reshape(CELLS, CELLS)
    return np.ascontiguousarray((bits * 255).repeat(side // CELLS, 0).repeat(side // CELLS, 1)[..., None].repeat(3, 2))


def number_on(frame: Tensor) -> int:
    """The number that a (3, S, S) uint8 picture shows."""
    cell = frame.shape[-1] // CELLS
    middles = frame[0, cell // 2 :: cell, cell // 2 :: cell].flatten() > 127
    return sum(int(bit) << i for i, bit in enumerate(middles))


def write_clip(
    path: Path,
    ticks: Sequence[int],
    tick: Fraction,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    rotation: int = 0,
    side: int = SIDE,
) -> Path:
    """Write picture i, showing the number i, at ``ticks[i] * tick`` seconds."""
    with av.open(str(path), "w", options={"movflags": "+faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=1 / tick)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = tick
        stream.options = options or {}
        if rotation:
            stream.set_display_rotation(rotation)
        for number, time in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(board(number, side), format="rgb24")
            frame.pts, frame.time_base = time, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_tone(path: Path, seconds: int = 2) -> Path:
    """Write a file that holds sound only."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000 * seconds), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cut(path: Path, to: Path, share: float) -> Path:
    """Copy the first ``share`` of a file."""
    data = path.read_bytes()
    to.write_bytes(data[: int(len(data) * share)])
    return to


def damage(path: Path, to: Path, size: int, at: float = 0.5, seed: int = 0) -> Path:
    """Copy a file with ``size`` bytes from ``at`` of its length overwritten with noise."""
    data = bytearray(path.read_bytes())
    start = int(len(data) * at)
    data[start : start + size] = np.random.default_rng(seed).bytes(size)
    to.write_bytes(data)
    return to


def numbers(chunks: Iterable) -> list[int]:
    """The numbers that the pictures of all chunks show."""
    return [number_on(frame) for chunk in chunks for frame in chunk.frames]
