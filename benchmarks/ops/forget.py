# SPDX-License-Identifier: Apache-2.0
"""The queries of a memory of ten minutes (an hour on a GPU), beside the original's order: draw and gather for all
frames, then drop frames.

Floor: each kept row is read once and written once; the backward reads those rows and writes every token's gradient.
The rows lie apart, and torch's index_select of them takes 1.6 times as long as a copy of the same bytes: predicted is
60 % of a copy. The gradient is fresh memory, which the system clears first: compare it with a copy into fresh memory.
The table of `make bench` has the share that is measured.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.suite import DTYPES, OURS, SHAPES, Bench, Shape, Work, by_device, grad, size_of, tolerance
from hourllava_ext import forget, reference

FRAMES, PATCHES, KEPT = by_device(600, 3600), 64, 16


def original(tokens: Tensor, frames: Tensor, draws: Tensor, newline: Tensor) -> Tensor:
    """Choose and gather patches of every frame, and only then keep a quarter of the frames."""
    chosen = draws.topk(KEPT, dim=1).indices.sort(dim=1).values
    sampled = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))
    return torch.cat([sampled, newline.expand(FRAMES, 1, -1)], dim=1)[frames]


def make(step: str, shape: Shape, dtype: torch.dtype) -> Bench:
    backward = step == "backward"
    tokens = torch.randn(FRAMES, PATCHES, shape.width).to(dtype).requires_grad_(backward)
    newline = torch.randn(shape.width).to(dtype).requires_grad_(backward)
    frames, draws = torch.linspace(0, FRAMES - 1, FRAMES // 4).long(), torch.rand(FRAMES, PATCHES)
    args = tokens, frames, draws.topk(KEPT, dim=1).indices.sort(dim=1).values[frames], newline
    ways = {
        OURS: lambda: forget(*args)[0],
        "reference": lambda: reference.forget(*args)[0],
        "original": lambda: original(tokens, frames, draws, newline),
    }
    if backward:
        ways = {name: grad(way, [tokens, newline]) for name, way in ways.items()}
    kept = len(frames) * (KEPT + 1) * shape.width * tokens.element_size()
    work = Work(bytes=kept + (size_of(tokens) if backward else kept))
    return Bench("forget", step, shape.name, dtype, work, ways, tolerance(dtype, 256) if backward else 0.0)


@pytest.mark.parametrize("way", [OURS, "reference", "original"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("step", ["forward", "backward"])
def bench_forget(benchmark: Any, step: str, shape: Shape, dtype: torch.dtype, way: str) -> None:
    make(step, shape, dtype).run(benchmark, way)
