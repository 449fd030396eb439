# SPDX-License-Identifier: Apache-2.0
"""The queries of a question, 4096 (65536 on a GPU), added to a residual and normalised, beside torch's LayerNorm."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.suite import DTYPES, OURS, SHAPES, Bench, Shape, Work, by_device, grad, size_of, tolerance
from hourllava_ext import add_norm, reference

TOKENS = by_device(4096, 65536)


def make(step: str, shape: Shape, dtype: torch.dtype) -> Bench:
    rows = [torch.randn(TOKENS, shape.width).to(dtype) for _ in range(2)]
    args = [a.requires_grad_(step == "backward") for a in (*rows, *torch.randn(2, shape.width).to(dtype).unbind())]
    x, residual, weight, bias = args
    ways = {
        OURS: lambda: add_norm(*args),
        "reference": lambda: reference.add_norm(*args),
        "torch": lambda: F.layer_norm(x + residual, weight.shape, weight, bias),
    }
    moved = 3 * size_of(x)
    if step == "backward":
        ways = {name: grad(way, args) for name, way in ways.items()}
        moved = 4 * size_of(x)  # both summands and the gradient are read, one gradient is written
    # Gradients of weight and bias are sums over all rows.
    scale = 16 if step == "forward" else 4 * TOKENS**0.5
    return Bench("add_norm", step, shape.name, dtype, Work(bytes=moved), ways, tolerance(dtype, scale))


@pytest.mark.parametrize("way", [OURS, "reference", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("step", ["forward", "backward"])
def bench_add_norm(benchmark: Any, step: str, shape: Shape, dtype: torch.dtype, way: str) -> None:
    make(step, shape, dtype).run(benchmark, way)
