# SPDX-License-Identifier: Apache-2.0
"""A launch has up to 2^31 - 1 blocks along x and 65535 along y and z: a day of video fits, and so do many samples.

Nothing runs, and memory that nobody touches takes none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import emulation
import pytest
import torch
from torch import Tensor

from hourllava_ext.gpu import triton_kernels

PER_FRAME, HEADS, KEY_HEADS, WIDTH, PAGE = 64, 16, 2, 128, 128  # the 3B model's
MOST = (2**31 - 1, 65535, 65535)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


@contextmanager
def of_cuda() -> Iterator[Any]:
    emulation.build()
    with emulation.thread_order(emulation.NO_THREADS):
        yield torch.ops.hourllava_emulated


@contextmanager
def of_triton() -> Iterator[Any]:
    pytest.importorskip("triton", reason="NO TRITON: its grids are NOT TESTED; pip install triton")
    from hourllava_ext.triton.rope import _rope

    def launch(kernel: Any, *_: Any, grid: tuple[int, ...], **__: Any) -> None:
        assert all(size <= most for size, most in zip(grid, MOST, strict=False)), f"{kernel.__name__}: {grid}"
        launched.append(kernel.__name__)

    launched: list[str] = []
    with patch.object(type(_rope), "run", launch):
        yield SimpleNamespace(**triton_kernels())
    assert {"_rope", "_score", "_mass", "_page_gradients", "_sum_rows"} <= set(launched)


@pytest.mark.parametrize(("seconds", "queries", "samples"), [(86400, 8800, 1), (200, 70000, 70000)])
@pytest.mark.parametrize("kernels", [of_cuda, of_triton])
def test_a_launch_fits_into_a_grid(kernels: Any, seconds: int, queries: int, samples: int) -> None:
    rows, pages = seconds * (PER_FRAME + 1), seconds * (PER_FRAME + 1) // PAGE + 2
    keys, where, inv_freq = empty(rows, KEY_HEADS, WIDTH), torch.zeros(rows, dtype=torch.int64), torch.ones(32)
    pools = [empty(pages, KEY_HEADS, PAGE, WIDTH) for _ in range(2)]
    summary, lengths = empty(pages, KEY_HEADS, 3, WIDTH, dtype=torch.float32), torch.zeros(pages, dtype=torch.int32)
    query, own = empty(queries, HEADS, WIDTH), torch.zeros(queries, dtype=torch.int64)
    table = torch.zeros(samples, pages if samples == 1 else 3, dtype=torch.int32)
    cu_seqlens = torch.zeros(samples + 1, dtype=torch.int64)
    frames, patches = torch.zeros(8800, dtype=torch.int64), torch.zeros(8800, 16, dtype=torch.int64)
    parts, sums = empty(2, queries, HEADS, WIDTH), empty(2, HEADS, queries, dtype=torch.float32)
    with kernels() as ops:
        ops.page_write_(keys, keys, where, where, inv_freq, *pools, summary, lengths)
        ops.page_write_backward(*pools, where, where, inv_freq)
        ops.rope(keys, where, inv_freq)
        ops.retrieve(query, own, cu_seqlens, inv_freq, summary, table, lengths, 100)
        if hasattr(ops, "paged_attention"):
            args = query, *pools, table, lengths, own, cu_seqlens, inv_freq
            out, lse, _ = ops.paged_attention(*args, 0.1, empty(queries, dtype=torch.float32))
            ops.paged_attention_backward(out, lse, *args, out, lse, 0.1)
        ops.merge_attention_backward(*ops.merge_attention(parts, sums), parts, sums)
        kept, _ = ops.forget(empty(seconds, PER_FRAME, 32), frames, patches, empty(32))
        ops.forget_backward(kept, frames, patches, seconds, PER_FRAME)
        ops.pool_grid_backward(ops.pool_grid(empty(seconds, 27**2, 8), 8), 8, 27**2)
        ops.keyframe_score(empty(seconds, 32))
        normed, *statistics = ops.add_norm(kept[:, 0], kept[:, 1], empty(32), empty(32), 1e-5)
        ops.add_norm_backward(normed, kept[:, 0], kept[:, 1], empty(32), *statistics)
