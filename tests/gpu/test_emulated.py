# SPDX-License-Identifier: Apache-2.0
"""What emulated threads show and a GPU may hide: a kernel that forgets to wait for other threads."""

import emulation
import pytest
import torch
from tools import frequencies
from torch import Tensor

import hourllava_ext


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
    rows, residual = torch.randn(2, 20, 16 * width).to(dtype)
    weight, bias = torch.randn(2, 16 * width).to(dtype)
    normed, *statistics = ops.add_norm(rows, residual, weight, bias, 1e-5)
    results += [normed, *statistics, *ops.add_norm_backward(normed, rows, residual, weight, *statistics)]
    tokens, newline = torch.randn(5, 9, width).to(dtype), torch.randn(width).to(dtype)
    frames, patches = torch.randint(5, (37,)), torch.randint(9, (37, 3))
    kept, position_ids = ops.forget(tokens, frames, patches, newline)
    results += [kept, position_ids, *ops.forget_backward(kept, frames, patches, 5, 9)]
    pooled = ops.pool_grid(tokens, 2)
    results += [
        pooled,
        ops.pool_grid_backward(pooled, 2, 9),
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


def test_pool_beyond_32_bits() -> None:
    """A pool of more than 2^31 elements, written at both ends (on the CPU untouched pages take no memory)."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        emulation.build()
    write = hourllava_ext.page_write_ if on_gpu else torch.ops.hourllava_emulated.page_write_
    with torch.device("cuda" if on_gpu else "cpu"):
        width, page_size, count = 128, 128, 2**17 + 3
        keys, values = (torch.empty(count, 1, page_size, width, dtype=torch.bfloat16) for _ in range(2))
        assert keys.numel() > 2**31
        summary, lengths = torch.zeros(count, 1, 3, width), torch.zeros(count, dtype=torch.int32)
        rows, inv_freq = torch.randn(3, 1, width, dtype=torch.bfloat16), torch.ones(16)
        slots = torch.tensor([0, 2**16 * page_size, (count - 1) * page_size])
        write(rows, rows, torch.zeros(3, dtype=torch.int64), slots, inv_freq, keys, values, summary, lengths)
        assert torch.equal(keys.flatten(0, 2)[slots], rows[:, 0])
        assert torch.equal(values.flatten(0, 2)[slots], rows[:, 0])
        assert lengths.nonzero()[:, 0].tolist() == (slots // page_size).tolist()
        assert torch.equal(summary[-1, 0], rows[2].float().expand(3, width))
