# SPDX-License-Identifier: Apache-2.0
"""Choosing 1/16 of an hour's pages for a question: `pytest benchmarks/ops/retrieve.py`."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hourllava_ext import reference, retrieve

PAGES = 1829
WAYS = {"hourllava": retrieve, "torch": reference.retrieve}


def make(queries: int, heads: tuple[int, int], width: int) -> list[Tensor]:
    query = torch.randn(queries, heads[0], width)
    # Means, then boxes of the width that 128 normal numbers span; scenes differ.
    centre = torch.randn(PAGES, heads[1], 1, width)
    summary = centre + torch.tensor([0.0, -2.5, 2.5])[:, None] * torch.rand(PAGES, heads[1], 1, width)
    table = torch.randperm(PAGES).to(torch.int32)[None]
    lengths = torch.full((PAGES,), 128, dtype=torch.int32)
    inv_freq = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    positions = torch.randint(0, PAGES * 128, (queries,))
    return [query, positions, torch.tensor([0, queries]), inv_freq, summary, table, lengths]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(550, (2, 1), 48), (550, (16, 2), 128)], ids=["tiny model", "3B shape"])
def bench_retrieve(benchmark: Callable, shape: tuple[int, tuple[int, int], int], way: str) -> None:
    args = make(*shape)
    assert torch.equal(retrieve(*args, PAGES // 16), reference.retrieve(*args, PAGES // 16))
    benchmark(WAYS[way], *args, PAGES // 16)
