# SPDX-License-Identifier: Apache-2.0
"""Writing an hour of keys and values to pages, beside copying them: `pytest benchmarks/ops/page_write.py`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hourllava_ext import page_write, page_write_, reference

ROWS, PAGE = 234_000, 128
PAGES = -(-ROWS // PAGE)


def make(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of the tiny model's shape, and the pools they go to."""
    key, value = torch.randn(2, ROWS, 1, 48, dtype=dtype)
    rows = [key, value, torch.arange(ROWS), torch.arange(ROWS), 10000.0 ** -(torch.arange(12) / 12)]
    pools = [torch.zeros(PAGES, 1, PAGE, 48, dtype=dtype) for _ in range(2)]
    summary = torch.zeros(PAGES, 1, 3, 48)
    return rows, [*pools, summary, torch.zeros(PAGES, dtype=torch.int32)]


def copy(rows: list[Tensor], pools: list[Tensor]) -> None:
    for pool, new in zip(pools, rows[:2], strict=False):
        pool.view(-1, 1, 48)[:ROWS].copy_(new)


WAYS: dict[str, Callable[[list[Tensor], list[Tensor]], Any]] = {
    "hourllava": lambda rows, pools: page_write_(*rows, *pools),
    "torch": lambda rows, pools: reference.page_write_(*rows, *pools),
    "copy alone": copy,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def bench_page_write_(benchmark: Callable, way: str, dtype: torch.dtype) -> None:
    rows, pools = make(dtype)
    plain = [p.clone() for p in pools]
    page_write_(*rows, *pools)
    reference.page_write_(*rows, *plain)
    for ours, theirs in zip(pools, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=8 * torch.finfo(dtype).eps)
    benchmark(WAYS[way], rows, pools)


@pytest.mark.parametrize("way", ["hourllava", "torch"])
def bench_backward(benchmark: Callable, way: str) -> None:
    rows, _ = make(torch.float32)
    leaves = [r.requires_grad_() for r in rows[:2]]
    out = (page_write if way == "hourllava" else reference.page_write)(*rows, PAGES, PAGE)[:2]
    benchmark(lambda: torch.autograd.grad(out, leaves, [torch.ones_like(o) for o in out], retain_graph=True))
