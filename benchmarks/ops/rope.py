# SPDX-License-Identifier: Apache-2.0
"""Partial rotary of 1024 tokens of 16 heads: `pytest benchmarks/ops/rope.py`."""

from collections.abc import Callable

import pytest
import torch

from hourllava_ext import reference, rope

WAYS = {"hourllava": rope, "torch": reference.rope}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def bench_rope(benchmark: Callable, way: str, dtype: torch.dtype) -> None:
    x = torch.randn(1024, 16, 128, dtype=dtype)
    position_ids = torch.randperm(234_000)[:1024]
    inv_freq = 10000.0 ** -(torch.arange(32) / 32)
    args = x, position_ids, inv_freq
    torch.testing.assert_close(rope(*args), reference.rope(*args), rtol=0, atol=8 * torch.finfo(dtype).eps)
    benchmark(WAYS[way], *args)
