# SPDX-License-Identifier: Apache-2.0
"""Partial rotary of the queries of a minute, at places strewn over an hour.

Floor: each query is read once and written once; the table of a token serves all its heads. Predicted is three
quarters of a copy in a cache, and all of one from memory. The table of `make bench` has the share that is measured.
"""

from typing import Any

import pytest
import torch

from benchmarks.suite import DTYPES, OURS, SHAPES, Bench, Shape, Work, by_device, frequencies, grad, size_of, tolerance
from hourllava_ext import reference, rope

TOKENS = by_device(4096, 65536)


def make(step: str, shape: Shape, dtype: torch.dtype) -> Bench:
    x = torch.randn(TOKENS, shape.heads[0], shape.head_dim).to(dtype).requires_grad_(step == "backward")
    args = x, torch.randint(0, 234_000, (TOKENS,)), frequencies(shape.head_dim)
    ways = {OURS: lambda: rope(*args), "reference": lambda: reference.rope(*args)}
    if step == "backward":
        ways = {name: grad(way, [x]) for name, way in ways.items()}
    return Bench("rope", step, shape.name, dtype, Work(bytes=2 * size_of(x)), ways, tolerance(dtype, 64))


@pytest.mark.parametrize("way", [OURS, "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("step", ["forward", "backward"])
def bench_rope(benchmark: Any, step: str, shape: Shape, dtype: torch.dtype, way: str) -> None:
    make(step, shape, dtype).run(benchmark, way)
