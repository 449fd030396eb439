# SPDX-License-Identifier: Apache-2.0
"""Four parts of 2048 queries of 16 heads to one: `pytest benchmarks/ops/merge_attention.py`."""

from collections.abc import Callable

import pytest
import torch

from hourllava_ext import merge_attention, reference

WAYS = {"hourllava": merge_attention, "torch": reference.merge_attention}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def bench_merge_attention(benchmark: Callable, way: str, dtype: torch.dtype) -> None:
    out, lse = torch.randn(4, 2048, 16, 128, dtype=dtype), torch.randn(4, 16, 2048)
    torch.testing.assert_close(merge_attention(out, lse), reference.merge_attention(out, lse))
    benchmark(WAYS[way], out, lse)


@pytest.mark.parametrize("way", WAYS)
def bench_merge_attention_backward(benchmark: Callable, way: str) -> None:
    out, lse = torch.randn(4, 512, 16, 128, requires_grad=True), torch.randn(4, 16, 512, requires_grad=True)
    grads = torch.randn(512, 16, 128), torch.randn(16, 512)

    def gradients(op: Callable) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(op(out, lse), (out, lse), grads)

    torch.testing.assert_close(gradients(merge_attention), gradients(reference.merge_attention), rtol=1e-4, atol=1e-4)
    benchmark(gradients, WAYS[way])
