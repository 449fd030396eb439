# SPDX-License-Identifier: Apache-2.0
"""The patches of 48 frames (1024 on a GPU) pooled to 8 x 8, beside torch's interpolation.

Floor: the four taps of a cell are read once and the cell is written; of 27 x 27 patches, 16 x 16 are taps, which lie
apart two by two: predicted is 80 % of a copy in float32 and, with rows half as long, less in 16 bits. The backward
reads the cells and writes every patch, most of them zeros, to fresh memory, which the system clears first: compare it
with a copy into fresh memory. The table of `make bench` has the share that is measured.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.suite import DTYPES, OURS, SHAPES, Bench, Shape, Work, by_device, grad, size_of, tolerance
from hourllava_ext import pool_grid, reference

FRAMES, GRID = by_device(48, 1024), 8


def interpolate(patches: Tensor, side: int) -> Tensor:
    """The original's way: channels first, interpolated, channels last again."""
    image = patches.view(FRAMES, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(image, size=(GRID, GRID), mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)


def make(step: str, shape: Shape, dtype: torch.dtype) -> Bench:
    patches = torch.randn(FRAMES, shape.side**2, shape.vision).to(dtype).requires_grad_(step == "backward")
    ways = {
        OURS: lambda: pool_grid(patches, GRID),
        "reference": lambda: reference.pool_grid(patches, GRID),
        "original": lambda: interpolate(patches, shape.side),
    }
    if step == "backward":
        ways = {name: grad(way, [patches]) for name, way in ways.items()}
    # Four taps a cell are read and one written; the backward writes every patch.
    pooled = size_of(patches) * GRID**2 / shape.side**2
    read = min(4 * pooled, size_of(patches))
    moved = pooled + (size_of(patches) if step == "backward" else read)
    return Bench("pool_grid", step, shape.name, dtype, Work(bytes=moved), ways, tolerance(dtype))


@pytest.mark.parametrize("way", [OURS, "reference", "original"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("step", ["forward", "backward"])
def bench_pool_grid(benchmark: Any, step: str, shape: Shape, dtype: torch.dtype, way: str) -> None:
    make(step, shape, dtype).run(benchmark, way)
