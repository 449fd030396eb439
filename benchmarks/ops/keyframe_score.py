# SPDX-License-Identifier: Apache-2.0
"""Scores of an hour at one frame a second, beside the original's T x T formula.

Floor: the features are read once, and multiplied: a frame's norm and its four later neighbours are five products for
each number. An hour's features lie in a cache, where that takes longer than a copy: predicted is a third of one. The
table of `make bench` has the share that is measured.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.suite import DTYPES, OURS, SHAPES, Bench, Shape, Work, size_of
from hourllava_ext import keyframe_score, reference

FRAMES, WINDOW = 3600, 9


def original(features: Tensor) -> Tensor:
    """All T x T cosines, all T x T windows of them, and of those the diagonal; exact inside the video only."""
    unit = F.normalize(features.float(), dim=-1)
    around = F.pad(unit @ unit.T, (WINDOW // 2, WINDOW // 2)).unfold(1, WINDOW, 1).sum(-1)
    return (around.diagonal() - 1) / (WINDOW - 1)


def make(shape: Shape, dtype: torch.dtype) -> Bench:
    features = torch.randn(FRAMES, shape.vision).to(dtype)
    ways = {
        OURS: lambda: keyframe_score(features),
        "reference": lambda: reference.keyframe_score(features),
        "original": lambda: original(features),
    }
    inside = {name: lambda way=way: way()[WINDOW:-WINDOW] for name, way in ways.items()}
    work = Work(bytes=size_of(features), flop=2.0 * features.numel() * WINDOW)
    return Bench("keyframe_score", "forward", shape.name, dtype, work, ways, 1e-5, inside)


@pytest.mark.parametrize("way", [OURS, "reference", "original"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def bench_keyframe_score(benchmark: Any, shape: Shape, dtype: torch.dtype, way: str) -> None:
    make(shape, dtype).run(benchmark, way)
