# SPDX-License-Identifier: Apache-2.0
"""Attention to a paged memory, forward and backward, beside torch on contiguous keys.

`pytest benchmarks/ops/paged_attention.py`. Torch gets keys that are already gathered, rotated and repeated for the
group, none of which is timed.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hourllava_ext import paged_attention, reference

PAGE = 128


class Case(NamedTuple):
    batch: int
    queries: int
    pages: int
    heads: tuple[int, int]
    width: int
    dtype: torch.dtype = torch.float32


CASES = {
    "an hour, tiny model": Case(1, 550, 1829, (2, 1), 48),
    "training, tiny model": Case(8, 564, 65, (2, 1), 48),
    "a minute, 3B shape": Case(1, 512, 31, (16, 2), 128),
}


class Inputs(NamedTuple):
    ours: list[Tensor]
    gathered: list[Tensor]  # query, key, value (B, Hq, rows, D)


def make(case: Case) -> Inputs:
    batch, queries, pages, (query_heads, key_heads), width, dtype = case
    pool = (batch * pages, key_heads, PAGE, width)
    query = torch.randn(batch * queries, query_heads, width, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(pool, dtype=dtype, requires_grad=True) for _ in range(2))
    table = torch.randperm(batch * pages).to(torch.int32).view(batch, pages)
    lengths = torch.full((batch * pages,), PAGE, dtype=torch.int32)
    positions = torch.randint(0, pages * PAGE, (len(query),))
    inv_freq = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    ours = [query, key, value, table, lengths, positions, torch.arange(batch + 1) * queries, inv_freq]
    turned = reference.rope(query.detach(), positions, inv_freq).view(batch, queries, query_heads, width)
    rows = [p.detach()[table].transpose(2, 3).flatten(1, 2).transpose(1, 2) for p in (key, value)]
    wide = [r.repeat_interleave(query_heads // key_heads, 1) for r in rows]
    return Inputs(ours, [t.contiguous().requires_grad_() for t in (turned.transpose(1, 2), *wide)])


WAYS = {
    "hourllava": lambda inputs: paged_attention(*inputs.ours)[0],
    "torch": lambda inputs: scaled_dot_product_attention(*inputs.gathered),
}


def agree(case: Case, inputs: Inputs) -> None:
    batch, queries, _, (query_heads, _), width, dtype = case
    ours, torchs = (way(inputs).detach() for way in WAYS.values())
    same = ours.view(batch, queries, query_heads, width).transpose(1, 2)
    torch.testing.assert_close(same, torchs, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def bench_forward(benchmark: Callable, case: Case, way: str) -> None:
    inputs = make(case)
    agree(case, inputs)
    with torch.no_grad():
        benchmark(WAYS[way], inputs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def bench_backward(benchmark: Callable, case: Case, way: str) -> None:
    inputs = make(case)
    out = WAYS[way](inputs)
    leaves = inputs.ours[:3] if way == "hourllava" else inputs.gathered
    benchmark(lambda: torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True))


@pytest.mark.parametrize("part", [1, 16])
def bench_part_of_the_pages(benchmark: Callable, part: int) -> None:
    """The whole memory of an hour, and the 1/16 that retrieval would list."""
    *tensors, table, lengths, positions, cu_seqlens, inv_freq = make(CASES["an hour, tiny model"]).ours
    table = table[:, : table.shape[1] // part]
    with torch.no_grad():
        benchmark(paged_attention, *tensors, table, lengths, positions, cu_seqlens, inv_freq)
