# SPDX-License-Identifier: Apache-2.0
"""Four parts of 1024 queries (16384 on a GPU) to one.

Floor: every part is read once and the whole is written; the backward reads the parts and writes a gradient of each.
The log-sum-exps are a hundredth of that and not counted. Predicted is 80 % of a copy in float32; in 16 bits half the
bytes wait for the same exponentials and the same four streams. The table of `make bench` has the share that is
measured.
"""

from typing import Any

import pytest
import torch

from benchmarks.suite import DTYPES, OURS, SHAPES, Bench, Shape, Work, by_device, grad, size_of, tolerance
from hourllava_ext import merge_attention, reference

PARTS, TOKENS = 4, by_device(1024, 16384)


def make(step: str, shape: Shape, dtype: torch.dtype) -> Bench:
    backward, heads = step == "backward", shape.heads[0]
    out = torch.randn(PARTS, TOKENS, heads, shape.head_dim).to(dtype).requires_grad_(backward)
    lse = torch.randn(PARTS, heads, TOKENS, requires_grad=backward)
    ways = {OURS: lambda: merge_attention(out, lse), "reference": lambda: reference.merge_attention(out, lse)}
    if backward:
        ways = {name: grad(way, [out, lse]) for name, way in ways.items()}
    moved = size_of(out) * (2 if backward else 1) + size_of(out) / PARTS
    return Bench("merge_attention", step, shape.name, dtype, Work(bytes=moved), ways, tolerance(dtype, 64))


@pytest.mark.parametrize("way", [OURS, "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("step", ["forward", "backward"])
def bench_merge_attention(benchmark: Any, step: str, shape: Shape, dtype: torch.dtype, way: str) -> None:
    make(step, shape, dtype).run(benchmark, way)
