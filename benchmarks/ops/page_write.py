# SPDX-License-Identifier: Apache-2.0
"""Keys and values of ten minutes (an hour on a GPU) to pages, beside a copy of the same bytes, which rotates and sums
nothing.

Floor: each key and value is read once and written once; summaries and tables of angles stay in a cache. Pages that
exist are warm memory, and four fifths of a copy into warm memory is predicted. The gradients are fresh memory where
they are large, which the system clears first: compare them with a copy into fresh memory. The table of `make bench`
has the share that is measured.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.suite import (
    DTYPES,
    OURS,
    PAGE,
    SHAPES,
    Bench,
    Shape,
    Work,
    by_device,
    frequencies,
    grad,
    size_of,
    tolerance,
)
from hourllava_ext import page_write, page_write_, reference

ROWS = by_device(600, 3600) * 64
PAGES = ROWS // PAGE


def make(step: str, shape: Shape, dtype: torch.dtype) -> Bench:
    heads, width = shape.heads[1], shape.head_dim
    key, value = (torch.randn(ROWS, heads, width).to(dtype).requires_grad_(step == "backward") for _ in range(2))
    rows = [key, value, torch.arange(ROWS), torch.arange(ROWS), frequencies(width)]
    work = Work(bytes=2 * size_of(key, value))
    if step == "backward":
        ways = {
            name: grad(lambda write=write: write(*rows, PAGES, PAGE)[:2], [key, value])
            for name, write in ((OURS, page_write), ("reference", reference.page_write))
        }
        return Bench("page_write", step, shape.name, dtype, work, ways, tolerance(dtype, 64))

    def pools() -> list[Tensor]:
        pair = [torch.zeros(PAGES, heads, PAGE, width, dtype=dtype) for _ in range(2)]
        return [*pair, torch.zeros(PAGES, heads, 3, width), torch.zeros(PAGES, dtype=torch.int32)]

    mine, plain = pools(), pools()
    ways = {OURS: lambda: page_write_(*rows, *mine), "reference": lambda: reference.page_write_(*rows, *plain)}

    def written(name: str) -> list[Tensor]:
        ways[name]()
        return mine if name == OURS else plain

    agree = {name: lambda name=name: written(name) for name in ways}
    return Bench("page_write", step, shape.name, dtype, work, ways, tolerance(dtype, 64), agree)


@pytest.mark.parametrize("way", [OURS, "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("step", ["forward", "backward"])
def bench_page_write(benchmark: Any, step: str, shape: Shape, dtype: torch.dtype, way: str) -> None:
    make(step, shape, dtype).run(benchmark, way)
