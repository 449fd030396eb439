# SPDX-License-Identifier: Apache-2.0
"""What emulated threads show and a GPU may hide: a kernel that forgets to wait for other threads."""

import emulation
import pytest
import torch
from tools import frequencies
from torch import Tensor


def everything(width: int, dtype: torch.dtype) -> list[Tensor]:
    """What every CUDA kernel makes of the same numbers."""
    torch.manual_seed(0)
    ops = torch.ops.hourllava_emulated
    key, value = torch.randn(2, 40, 2, width).to(dtype)
    where, slots, inv_freq = torch.randint(0, 5_600_000, (40,)), torch.randperm(48)[:40], frequencies(4)
    pages = ops.page_write(key, value, where, slots, inv_freq, 3, 16)
    results = [*pages, *ops.page_write_backward(*pages[:2], where, slots, inv_freq)]
    query = torch.randn(40, 6, width).to(dtype)
    table = torch.tensor([[2, 0, 1, -1], [1, -1, 0, -1]], dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 30, 40])
    results += [ops.rope(query, where, inv_freq)]
    results += [ops.retrieve(query, where, cu_seqlens, inv_freq, pages[2], table, pages[3], 2)]
    out, lse = torch.randn(3, 20, 2, width).to(dtype), torch.randn(3, 2, 20)
    merged = ops.merge_attention(out, lse)
    results += [*merged, *ops.merge_attention_backward(*merged, out, lse)]
    tokens, newline = torch.randn(5, 9, width).to(dtype), torch.randn(width).to(dtype)
    frames, patches = torch.randint(5, (37,)), torch.randint(9, (37, 3))
    kept, position_ids = ops.forget(tokens, frames, patches, newline)
    results += [kept, position_ids, *ops.forget_backward(kept, frames, patches, 5, 9)]
    pooled = ops.pool_grid(tokens, 2)
    results += [
        pooled,
        ops.pool_grid_backward(pooled, 2, 3),
        ops.keyframe_score(torch.randn(9, 8 * width).to(dtype), 4),
    ]
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 45])
def test_order_of_threads_changes_nothing(width: int, dtype: torch.dtype) -> None:
    emulation.build()
    first, *others = [run_in(order, width, dtype) for order in emulation.ORDERS]
    for results in others:
        for ours, theirs in zip(first, results, strict=True):
            assert torch.equal(ours, theirs)


def run_in(order: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    with emulation.thread_order(order):
        return everything(width, dtype)
