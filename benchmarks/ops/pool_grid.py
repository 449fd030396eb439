# SPDX-License-Identifier: Apache-2.0
"""27 x 27 patches of 32 frames to 8 x 8, forward and with backward: `pytest benchmarks/ops/pool_grid.py`."""

from collections.abc import Callable

import pytest
import torch

from hourllava_ext import pool_grid, reference

WAYS = {"hourllava": pool_grid, "torch": reference.pool_grid}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def bench_pool_grid(benchmark: Callable, way: str, dtype: torch.dtype) -> None:
    patches = torch.randn(32, 729, 1152, dtype=dtype)
    torch.testing.assert_close(pool_grid(patches, 8), reference.pool_grid(patches, 8))
    benchmark(WAYS[way], patches, 8)


@pytest.mark.parametrize("way", WAYS)
def bench_pool_grid_backward(benchmark: Callable, way: str) -> None:
    patches = torch.randn(8, 729, 1152, requires_grad=True)
    grad = torch.randn(8, 64, 1152)
    ours, torchs = (torch.autograd.grad(w(patches, 8), patches, grad)[0] for w in WAYS.values())
    torch.testing.assert_close(ours, torchs)
    benchmark(lambda: torch.autograd.grad(WAYS[way](patches, 8), patches, grad))
