# SPDX-License-Identifier: Apache-2.0
"""Which frames and which of their tokens become queries: the paper's forgetting (SPEC A.3.1, steps 3, 5 and 6)."""

import math

import numpy as np
import torch
from torch import Tensor

from .configuration import HourLlavaConfig


def spread_frames(frames: int, count: int) -> Tensor:
    """`count` frame numbers spread evenly from 0 to `frames` - 1, as int64 (count,).

    Equal to `np.linspace(0, frames - 1, count, dtype=int)`: a float64 product, floored. Integer division would give
    other frames for many lengths.
    """
    if count == 1:
        return torch.zeros(1, dtype=torch.int64)
    spread = (torch.arange(count, dtype=torch.float64) * ((frames - 1) / (count - 1))).floor().to(torch.int64)
    spread[-1] = frames - 1
    return spread


def remembered_frames(config: HourLlavaConfig, frames: int) -> int:
    """Frames that the memory of a video of `frames` frames holds: short videos are repeated up to `min_frames`."""
    return max(frames, config.min_frames)


def kept_frames(config: HourLlavaConfig, frames: int) -> Tensor:
    """Numbers of the frames that stay queries, of `frames` remembered ones: int64 (n,), ascending."""
    count = max(1, min(config.max_kept_frames, frames // config.temporal_ratio))
    return spread_frames(frames, count)


def spatial_picks(config: HourLlavaConfig, frames: Tensor, per_frame: int) -> Tensor:
    """Tokens that stay queries in each of `frames`.

    Args:
        frames: (n,) int64, each frame's number in its own video.
        per_frame: N, tokens of a frame, a square number.

    Returns:
        (n, k) int64 on the device of `frames`, ascending in each row. A frame's picks depend on its number, on
        `forgetting_seed` and on N alone, so that they are the same however the video was taken in.
    """
    if config.spatial_forgetting == "uniform":
        side, step = math.isqrt(per_frame), round(config.spatial_ratio**-0.5)
        picks = torch.arange(per_frame, device=frames.device).view(side, side)[::step, ::step].flatten()
        return picks.expand(len(frames), -1)
    count = math.ceil(per_frame * config.spatial_ratio)
    first_cell = frames.cpu().numpy().astype(np.uint64) * np.uint64(per_frame)
    cells = first_cell[:, None] + np.arange(per_frame, dtype=np.uint64)
    order = np.argsort(_scramble(_scramble(cells) ^ np.uint64(config.forgetting_seed)), axis=1, kind="stable")
    return torch.from_numpy(np.sort(order[:, :count], axis=1)).to(frames.device)


def _scramble(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose output looks random: multiply by odd constants, fold the high bits down."""
    for multiplier in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93):
        x = x * np.uint64(multiplier)
        x = x ^ (x >> np.uint64(32))
    return x
