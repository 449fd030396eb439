# SPDX-License-Identifier: Apache-2.0
"""A memory spread over processes: values and every gradient as in one process, by the error rule."""

import pytest
import torch
from tools import assert_error_rule
from torch import distributed as dist
from torch import multiprocessing

from hourllava.memory import MemoryPages, least_loaded, sharded_attention
from hourllava_ext import reference

PAGES, ROWS, KV_HEADS, HEADS, WIDTH, QUERIES = 11, 128, 2, 4, 16, 23


def make_inputs(dtype):
    """Queries of two samples, and pages of which each sample lists some."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    lengths = torch.full((PAGES,), ROWS, dtype=torch.int32)
    lengths[[3, 10]] = torch.tensor([5, 70], dtype=torch.int32)
    table = torch.tensor([[0, 1, 2, 3, 4, 5, 6, -1], [4, 7, 8, 9, 10, -1, -1, -1]], dtype=torch.int32)
    return {
        "query": draw(QUERIES, HEADS, WIDTH),
        "keys": draw(PAGES, KV_HEADS, ROWS, WIDTH),
        "values": draw(PAGES, KV_HEADS, ROWS, WIDTH),
        "lengths": lengths,
        "table": table,
        "where": (torch.arange(QUERIES), torch.tensor([0, 9, QUERIES]), 1 / 10 ** torch.arange(4.0)),
        "cotangents": (draw(QUERIES, HEADS, WIDTH), draw(HEADS, QUERIES)),
    }


def share(table, rank, ranks):
    """The pages (P,) bool that a rank owns, and the table in its own numbers."""
    mine = torch.arange(PAGES) % ranks == rank
    place = torch.where(mine, mine.cumsum(0) - 1, -1)
    return mine, torch.where(table >= 0, place[table.long()], -1).to(torch.int32)


def run_rank(rank, ranks, dtype, folder):
    """One rank: owns the pages whose number leaves the rest `rank`, and saves what it got."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    inputs = make_inputs(dtype)
    mine, table = share(inputs["table"], rank, ranks)
    leaves = [x.clone().requires_grad_() for x in (inputs["query"], inputs["keys"][mine], inputs["values"][mine])]
    pages = MemoryPages(leaves[1], leaves[2], torch.empty(0), inputs["lengths"][mine], table)
    out, lse = sharded_attention(leaves[0], pages, *inputs["where"])
    cotangents = [c.to(x.dtype) for c, x in zip(inputs["cotangents"], (out, lse), strict=True)]
    gradients = torch.autograd.grad((out, lse), leaves, cotangents)
    # Loads of 30, 20, 10 ... : the last rank has the least, until it is given more.
    owners = [least_loaded(10 * (ranks - rank)), least_loaded(10 if rank else 5)]
    torch.save([out.detach(), lse.detach(), *gradients, owners], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def one_process(ranks, dtype, inputs):
    """The same in plain torch: each part on its own, then merged. With one part, it is plain attention."""
    query, keys, values = leaves = [inputs[name].to(dtype).requires_grad_() for name in ("query", "keys", "values")]
    parts = []
    for rank in range(ranks):
        mine, table = share(inputs["table"], rank, ranks)
        parts.append(
            reference.paged_attention(query, keys[mine], values[mine], table, inputs["lengths"][mine], *inputs["where"])
        )
    out, lse = parts[0] if ranks == 1 else reference.merge_attention(*map(torch.stack, zip(*parts, strict=True)))
    cotangents = [c.to(x.dtype) for c, x in zip(inputs["cotangents"], (out, lse), strict=True)]
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, cotangents)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_many_processes_are_one(ranks, dtype, tmp_path):
    multiprocessing.spawn(run_rank, (ranks, dtype, str(tmp_path)), nprocs=ranks)
    got = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    inputs = make_inputs(dtype)
    plain, exact = one_process(ranks, dtype, inputs), one_process(1, torch.float64, inputs)
    for rank, (out, lse, grad_query, grad_keys, grad_values, owners) in enumerate(got):
        mine = torch.arange(PAGES) % ranks == rank
        names = ("out", "lse", "grad query", "grad keys", "grad values")
        values = (out, lse, grad_query, grad_keys, grad_values)
        for number, (name, value) in enumerate(zip(names, values, strict=True)):
            chosen = mine if number > 2 else slice(None)
            assert_error_rule(value, plain[number][chosen], exact[number][chosen], f"{name} of rank {rank}")
        assert owners == [ranks - 1, 0]
    for other in got[1:]:
        for mine, theirs in zip(got[0][:3], other[:3], strict=True):
            assert torch.equal(mine, theirs)
