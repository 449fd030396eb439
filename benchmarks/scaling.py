# SPDX-License-Identifier: Apache-2.0
"""Asking against the length of the video, from a minute to a day, and against threads.

A question of 64 tokens reads every page of one MemAug block of the 3B shape, and 1/16 of them; an hour is 1829 pages.
"""

from typing import Any

import pytest
import torch

from benchmarks.suite import OURS, PAGE, SHAPES, Bench, Work, attention_in_parts, frequencies, size_of, tolerance
from hourllava_ext import paged_attention

TOKENS = 64
ROWS_AN_HOUR = 234_000
HOURS = [1 / 60, 1 / 6, 1.0, 6.0, 24.0]


def make(hours: float, part: int) -> Bench:
    shape = SHAPES[0]
    (query_heads, key_heads), width = shape.heads, shape.head_dim
    pages = -(-int(ROWS_AN_HOUR * hours) // PAGE)
    listed = -(-pages // part)
    pool = torch.randn(pages, key_heads, PAGE, width, dtype=torch.bfloat16)
    query = torch.randn(TOKENS, query_heads, width, dtype=torch.bfloat16)
    table = torch.randperm(pages)[:listed].to(torch.int32)[None]
    places = torch.randint(0, pages * PAGE, (TOKENS,)), torch.tensor([0, TOKENS]), frequencies(width)
    # One pool stands for keys and values: a day of both would be 11 GB.
    args = [query, pool, pool, table, torch.full((pages,), PAGE, dtype=torch.int32), *places]
    flop = 4.0 * TOKENS * query_heads * listed * PAGE * width
    work = Work(2 * size_of(pool) * listed / pages, flop, held=2 * size_of(pool))
    name = f"3B, {hours * 60:g} min, 1/{part} of the pages"
    return Bench(
        "paged_attention",
        "forward",
        name,
        torch.bfloat16,
        work,
        {OURS: lambda: paged_attention(*args)[0]},
        tolerance(torch.bfloat16),
        expected=lambda: attention_in_parts(*args),
        notes={"minutes": hours * 60, "part": part},
    )


@pytest.mark.parametrize("part", [1, 16])
@pytest.mark.parametrize("hours", [pytest.param(h, marks=pytest.mark.long if h > 1 else ()) for h in HOURS])
def bench_length(benchmark: Any, hours: float, part: int) -> None:
    make(hours, part).run(benchmark, OURS)


@pytest.mark.parametrize("threads", [1, 2, 4, 8, 16])
def bench_threads(benchmark: Any, threads: int) -> None:
    before = torch.get_num_threads()
    if threads > before:
        pytest.skip(f"this machine gives torch {before} threads, not {threads}")
    case = make(1 / 6, 1)
    case.shape += f", {threads} threads"
    torch.set_num_threads(threads)
    try:
        case.run(benchmark, OURS)
    finally:
        torch.set_num_threads(before)
