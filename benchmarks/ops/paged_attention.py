# SPDX-License-Identifier: Apache-2.0
"""Attention to a minute of memory, beside torch on keys that are gathered and rotated beforehand, untimed; on a GPU to
an hour, too, beside every attention that is installed.

Floors at the 3B shape, 512 queries by 31 pages: two products forward, 16.6 GFLOP, and five backward, 41.6 GFLOP, none
of them twice; queries, results and pages are 8.3 MB in bfloat16, a millisecond of copying, so the products bind. For a
core that starts two vectors of products a cycle (Zen 5 at 3.8 GHz: 486 GFLOP/s in pairs of bfloat16, 243 in float32),
and a softmax of 10 cycles for 16 weights forward and 16 backward, that predicts:

    ms on one core              products + softmax   measured   share of the core's products   torch, the fastest way
    bfloat16, forward                  34 +  5           49               70 %                        189  (3.8 x)
    bfloat16, backward                 86 +  9          131               66 %                        307  (2.3 x)
    float32, forward                   68 +  5           90               76 %                        196  (2.2 x)
    float32, backward                 171 +  9          231               74 %                        500  (2.2 x)

The rest goes to lines that come from the second cache and to sums that leave the registers, and in the backward a tenth
to scratch: clearing it, and adding up the shares of the query's gradient. Torch's fastest way of three is "folded"
here. A backward of four times that speed is above what the core's products can do: 41.6 GFLOP in 77 ms are 540 GFLOP/s.

Medians of CPU time, which a busy machine disturbs less, on an AMD EPYC 9005 with torch 2.13:
`OMP_NUM_THREADS=1 python -m pytest benchmarks/ops/paged_attention.py -k 3B --benchmark-timer=time.process_time`
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.peers import GPU_PEERS
from benchmarks.suite import (
    DTYPES,
    OURS,
    PAGE,
    SHAPES,
    Bench,
    Shape,
    Work,
    attention_in_parts,
    flat,
    frequencies,
    grad,
    size_of,
    tolerance,
    train,
)
from hourllava_ext import paged_attention, reference, rope

QUERIES, PAGES = 512, 31
# Ways to torch's attention: with repeated keys, told of the groups, and with the heads of a group as rows of one head.
TORCH = ["torch", "grouped", "folded"]


def make(step: str, shape: Shape, dtype: torch.dtype, pages: int = PAGES) -> Bench:
    backward, (query_heads, key_heads), width = step == "backward", shape.heads, shape.head_dim
    query = torch.randn(QUERIES, query_heads, width).to(dtype).requires_grad_(backward)
    pools = [torch.randn(pages, key_heads, PAGE, width).to(dtype).requires_grad_(backward) for _ in range(2)]
    table = torch.randperm(pages).to(torch.int32)[None]
    places = torch.randint(0, pages * PAGE, (QUERIES,)), torch.tensor([0, QUERIES]), frequencies(width)
    args = [query, *pools, table, torch.full((pages,), PAGE, dtype=torch.int32), *places]
    ways: dict[str, Callable[[], Any]] = {OURS: lambda: paged_attention(*args)[0]}
    leaves = {OURS: args[:3], "reference": args[:3]}
    for name, (tensors, grouped) in torch_ways(args).items():
        leaves[name] = [t[None].contiguous().requires_grad_(backward) for t in tensors]
        ways[name] = partial(torch_attention, leaves[name], query_heads, grouped)
    ways["reference"] = lambda: reference.paged_attention(*args)[0]
    agree: dict[str, Callable[[], Any]] = {}
    flop = 4.0 * QUERIES * query_heads * pages * PAGE * width
    if backward:
        ways = {name: grad(way, leaves[name]) for name, way in ways.items()}
        # Torch's gradients are those of rotated queries and gathered keys: theirs are ours by another route.
        agree = {name: lambda name=name: in_pages(flat(ways[name]()), args, name) for name in ways}
    work = Work(bytes=size_of(query, query, *pools), flop=flop * (2.5 if backward else 1))
    scale = 64.0 if backward else 16.0
    return Bench("paged_attention", step, shape.name, dtype, work, ways, tolerance(dtype, scale), agree)


def torch_ways(args: list[Tensor]) -> dict[str, tuple[list[Tensor], bool]]:
    """Query (heads, rows, D), key and value for each way that torch can take, and whether it is told of the groups."""
    query, *pools, table, _, positions, _, inv_freq = (a.detach() for a in args)
    turned = reference.rope(query, positions, inv_freq).transpose(0, 1)
    rows = [pool[table[0].long()].transpose(1, 2).flatten(0, 1).transpose(0, 1) for pool in pools]
    group = len(turned) // len(rows[0])
    return {
        "torch": ([turned, *(r.repeat_interleave(group, 0) for r in rows)], False),
        "grouped": ([turned, *rows], True),
        "folded": ([turned.reshape(len(rows[0]), -1, turned.shape[2]), *rows], False),
    }


def torch_attention(tensors: list[Tensor], heads: int, grouped: bool) -> Tensor:
    """(M, Hq, D)."""
    out = scaled_dot_product_attention(*tensors, enable_gqa=grouped)
    return out.view(heads, -1, out.shape[-1]).transpose(0, 1)


def in_pages(gradients: list[Tensor], args: list[Tensor], way: str) -> list[Tensor]:
    """Gradients of query and pages, from those of torch's rotated queries and gathered rows."""
    if way not in TORCH:
        return gradients
    query, keys, _, table, _, positions, _, inv_freq = args
    pages, heads, size, width = keys.shape
    turned = gradients[0].reshape(query.shape[1], -1, width).transpose(0, 1)
    back = reference.rope(turned, positions, inv_freq, inverse=True)
    pools = []
    for rows in gradients[1:]:
        summed = rows[0].float().reshape(heads, -1, pages, size, width).sum(1).transpose(0, 1)
        pools.append(torch.empty_like(summed).index_copy_(0, table[0].long(), summed))
    return [back.view_as(query), *pools]


@pytest.mark.parametrize("way", [OURS, *TORCH, "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("step", ["forward", "backward"])
def bench_paged_attention(benchmark: Any, step: str, shape: Shape, dtype: torch.dtype, way: str) -> None:
    make(step, shape, dtype).run(benchmark, way)


@pytest.mark.parametrize("pages", [16, 256])
def bench_part_of_the_pages(benchmark: Any, pages: int) -> None:
    """Eight minutes of memory, and the 1/16 that retrieval would list."""
    case = make("forward", SHAPES[0], torch.bfloat16, pages)
    case.shape += f", {pages} pages"
    case.run(benchmark, OURS)


# A question about an hour: 512 frames of 16 tokens and a newline, and 96 words; 234,000 rows of memory.
HOUR_QUERIES, HOUR_PAGES = 512 * 17 + 96, 1829
HOUR_EXPECTED: dict[int, Tensor] = {}  # by the part of the pages that is read


def make_hour(step: str, part: int) -> Bench:
    """The 3B shape in bfloat16, reading 1/part of the pages.

    A peer reads rows that were gathered, and gets queries that were rotated, beforehand and untimed. With "gather" in
    its name it gathers and rotates in each call, as it would have to in our place.
    """
    (query_heads, key_heads), width = SHAPES[0].heads, SHAPES[0].head_dim
    training = step != "forward"
    query = torch.randn(HOUR_QUERIES, query_heads, width, dtype=torch.bfloat16, requires_grad=training)
    pools = [torch.randn(HOUR_PAGES, key_heads, PAGE, width, dtype=torch.bfloat16) for _ in range(2)]
    pools = [pool.requires_grad_(training) for pool in pools]
    table = torch.randperm(HOUR_PAGES)[: -(-HOUR_PAGES // part)].sort().values.to(torch.int32)[None]
    positions, inv_freq = torch.randint(0, HOUR_PAGES * PAGE, (HOUR_QUERIES,)), frequencies(width)
    places = positions, torch.tensor([0, HOUR_QUERIES]), inv_freq
    args = [query, *pools, table, torch.full((HOUR_PAGES,), PAGE, dtype=torch.int32), *places]

    def gathered() -> list[Tensor]:
        turned = rope(query, positions, inv_freq).transpose(0, 1)
        rows = [pool[table[0].long()].transpose(0, 1).flatten(1, 2) for pool in pools]
        return [t[None] for t in (turned, *rows)]

    ready = [t.detach().contiguous().requires_grad_(training) for t in gathered()]
    functions: dict[str, Callable[[], Tensor]] = {OURS: lambda: paged_attention(*args)[0]}
    for name, attend in GPU_PEERS.items():
        functions[name] = lambda attend=attend: attend(*ready)[0].transpose(0, 1)
        functions[f"gather, {name}"] = lambda attend=attend: attend(*gathered())[0].transpose(0, 1)
    ways: dict[str, Callable[[], Any]] = dict(functions)
    agree: dict[str, Callable[[], Any]] = {}
    if training:
        # Of peers with rows made beforehand only the output is compared: their gradients are of other tensors.
        inside = {name for name in functions if name == OURS or name.startswith("gather")}
        for name, function in functions.items():
            ways[name] = train(function, args[:3] if name in inside else ready)
            agree[name] = function
    rows = table.shape[1] * PAGE
    flop = 4.0 * HOUR_QUERIES * query_heads * rows * width * (3.5 if training else 1)
    work = Work(bytes=size_of(query, query) + 4.0 * rows * key_heads * width, flop=flop)

    def expected() -> Tensor:
        # Every benchmark draws the same numbers, and the reference takes longer than what is measured.
        if part not in HOUR_EXPECTED:
            HOUR_EXPECTED[part] = attention_in_parts(*args)
        return HOUR_EXPECTED[part]

    shape = f"3B, an hour, 1/{part} of the pages"
    return Bench("paged_attention", step, shape, torch.bfloat16, work, ways, tolerance(torch.bfloat16), agree, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("way", [OURS, *GPU_PEERS, "gather, cuDNN", "gather, flash 3"])
@pytest.mark.parametrize("part", [1, 16])
@pytest.mark.parametrize("step", ["forward", "forward+backward"])
def bench_hour(benchmark: Any, step: str, part: int, way: str) -> None:
    make_hour(step, part).run(benchmark, way)
