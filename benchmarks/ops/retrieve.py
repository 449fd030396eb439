# SPDX-License-Identifier: Apache-2.0
"""Choosing 1/16 of an hour's pages for a question.

Floor: every query is multiplied with both corners of every page's box. That is 1 / 128 of the products that attention
to all pages takes, and at the rate of float32 some 2 % of its time: predicted is 13 times dense with 1/16 of the
pages.
"""

from typing import Any

import pytest
import torch

from benchmarks.suite import OURS, PAGE, SHAPES, Bench, Shape, Work, frequencies, size_of
from hourllava_ext import reference, retrieve

QUERIES, PAGES = 512, 1829


def make(shape: Shape) -> Bench:
    (query_heads, key_heads), width = shape.heads, shape.head_dim
    # Means, then boxes of the width that 128 normal numbers span; scenes differ.
    centre = torch.randn(PAGES, key_heads, 1, width)
    summary = centre + torch.tensor([0.0, -2.5, 2.5])[:, None] * torch.rand(PAGES, key_heads, 1, width)
    args = [
        torch.randn(QUERIES, query_heads, width),
        torch.randint(0, PAGES * PAGE, (QUERIES,)),
        torch.tensor([0, QUERIES]),
        frequencies(width),
        summary,
        torch.randperm(PAGES).to(torch.int32)[None],
        torch.full((PAGES,), PAGE, dtype=torch.int32),
    ]
    ways = {
        OURS: lambda: retrieve(*args, PAGES // 16),
        "reference": lambda: reference.retrieve(*args, PAGES // 16),
    }
    work = Work(bytes=size_of(summary), flop=4.0 * QUERIES * query_heads * PAGES * width)
    return Bench("retrieve", "forward", shape.name, torch.float32, work, ways)


@pytest.mark.parametrize("way", [OURS, "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def bench_retrieve(benchmark: Any, shape: Shape, way: str) -> None:
    make(shape).run(benchmark, way)
