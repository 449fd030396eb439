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
    if step == "forward":
        return Bench("add_norm", step, shape.name, dtype, Work(bytes=3 * size_of(x)), ways, tolerance(dtype, 64))
    ways = {name: grad(way, args) for name, way in ways.items()}
    # Torch adds up the gradients of weight and bias in bfloat16, which is far off after thousands of rows.
    agree = {name: lambda way=way: way()[:2] for name, way in ways.items()}
    # Both summands and the gradient are read, one gradient is written.
    return Bench("add_norm", step, shape.name, dtype, Work(bytes=4 * size_of(x)), ways, tolerance(dtype, 64), agree)


@pytest.mark.parametrize("way", [OURS, "reference", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("step", ["forward", "backward"])
def bench_add_norm(benchmark: Any, step: str, shape: Shape, dtype: torch.dtype, way: str) -> None:
    make(step, shape, dtype).run(benchmark, way)
