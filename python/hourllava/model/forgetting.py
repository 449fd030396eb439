# SPDX-License-Identifier: Apache-2.0
"""Which frames and which of their tokens become queries: the forgetting of arXiv 2506.05332."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import hourllava_ext as ext
from hourllava.errors import InputError

from .configuration import FORGETTING_RULES, HourLlavaConfig

# Keeps the frames that a seed draws apart from the patches that it draws.
_FRAMES = 0xA0761D6478BD642F


@dataclass(frozen=True)
class Forgetting:
    """The rules by which tokens become queries, and the seed of those that draw."""

    temporal: str  # "uniform", "random", "keyframe" or "question"
    spatial: str  # "uniform" or "random"
    seed: int

    @classmethod
    def of(
        cls, config: HourLlavaConfig, temporal: str | None = None, spatial: str | None = None, seed: int | None = None
    ) -> "Forgetting":
        """What the config says, where a call says nothing else.

        Raises:
            InputError: there is no such rule.
        """
        for (name, rules), given in zip(FORGETTING_RULES.items(), (temporal, spatial), strict=True):
            if given is not None and given not in rules:
                raise InputError(name, f"there is no rule {given!r}", f"choose from {', '.join(rules)}")
        return cls(
            temporal or config.temporal_forgetting,
            spatial or config.spatial_forgetting,
            (config.forgetting_seed if seed is None else seed) % 2**64,
        )


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


def kept_frames(
    config: HourLlavaConfig, frames: int, forgetting: Forgetting | None = None, rank: Tensor | None = None
) -> Tensor:
    """Numbers of the frames that stay queries, of `frames` remembered ones: int64 (n,), ascending.

    Args:
        forgetting: None is the config's.
        rank: (frames,) for "keyframe" and "question": the lowest are kept, of equals the earlier; see `rank_frames`.
    """
    forgetting = forgetting or Forgetting.of(config)
    count = max(1, min(config.max_kept_frames, frames // config.temporal_ratio))
    if forgetting.temporal == "uniform":
        return spread_frames(frames, count)
    if forgetting.temporal == "random":
        draws = _scramble(_scramble(np.arange(frames, dtype=np.uint64)) ^ np.uint64(forgetting.seed ^ _FRAMES))
        return torch.from_numpy(np.sort(np.argsort(draws, kind="stable")[:count]))
    assert rank is not None
    return rank.sort(stable=True).indices[:count].sort().values


def rank_frames(forgetting: Forgetting, features: Tensor | None, tokens: Tensor, question: Tensor) -> Tensor | None:
    """What `kept_frames` goes by, float32 (T,), lowest first; None for rules that look at no picture.

    Args:
        features: (T, N, Cv) the tower's, pooled as the memory holds them. "keyframe" keeps frames whose mean feature
            has the lowest mean cosine to those of their 8 nearest neighbours.
        tokens: (T, N, C) projected. "question" keeps frames whose mean token has the highest cosine to the mean of the
            question's words.
        question: (words, C) their embeddings.

    Raises:
        InputError: there are no features, or no words.
    """
    if forgetting.temporal == "keyframe":
        if features is None:
            todo = "choose another temporal_forgetting to ask a memory"
            raise InputError("keyframe forgetting", "a memory does not keep the tower's features it compares", todo)
        return ext.keyframe_score(features.mean(1))
    if forgetting.temporal == "question":
        if len(question) == 0:
            raise InputError("question forgetting", "no text joins the queries behind the video", "ask something")
        words = question.float().mean(0)
        return -F.cosine_similarity(tokens.float().mean(1), words[None], dim=-1).detach()
    return None


def spatial_picks(
    config: HourLlavaConfig, frames: Tensor, grid: tuple[int, int], forgetting: Forgetting | None = None
) -> Tensor:
    """Tokens that stay queries in each of `frames`.

    Args:
        frames: (n,) int64, each frame's number in its own video.
        grid: rows and columns of a frame's tokens, N in all.
        forgetting: None is the config's.

    Returns:
        (n, k) int64 on the device of `frames`, ascending in each row. A frame's picks depend on its number, on the seed
        and on N alone, so that they are the same however the video was taken in.
    """
    forgetting = forgetting or Forgetting.of(config)
    per_frame = grid[0] * grid[1]
    if forgetting.spatial == "uniform":
        step = round(config.spatial_ratio**-0.5)
        picks = torch.arange(per_frame, device=frames.device).view(grid)[::step, ::step].flatten()
        return picks.expand(len(frames), -1)
    count = math.ceil(per_frame * config.spatial_ratio)
    first_cell = frames.cpu().numpy().astype(np.uint64) * np.uint64(per_frame)
    cells = first_cell[:, None] + np.arange(per_frame, dtype=np.uint64)
    order = np.argsort(_scramble(_scramble(cells) ^ np.uint64(forgetting.seed)), axis=1, kind="stable")
    return torch.from_numpy(np.sort(order[:, :count], axis=1)).to(frames.device)


def _scramble(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose output looks random: multiply by odd constants, fold the high bits down."""
    for multiplier in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93):
        x = x * np.uint64(multiplier)
        x = x ^ (x >> np.uint64(32))
    return x
