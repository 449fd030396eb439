# SPDX-License-Identifier: Apache-2.0
"""Queries of a ten-minute memory, forward and with backward: `pytest benchmarks/ops/forget.py`."""

from collections.abc import Callable

import pytest
import torch

from hourllava_ext import forget, reference

WAYS = {"hourllava": forget, "torch": reference.forget}


def make(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    tokens = torch.randn(600, 64, 512, dtype=dtype, requires_grad=True)
    frames = torch.linspace(0, 599, 150).long()
    return tokens, frames, torch.rand(150, 64).topk(16).indices, torch.randn(512, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def bench_forget(benchmark: Callable, way: str, dtype: torch.dtype) -> None:
    args = make(dtype)
    torch.testing.assert_close(forget(*args), reference.forget(*args), rtol=0, atol=0)
    benchmark(WAYS[way], *args)


@pytest.mark.parametrize("way", WAYS)
def bench_forget_backward(benchmark: Callable, way: str) -> None:
    tokens, frames, patches, newline = make(torch.float32)
    grad = torch.randn(150, 17, 512)

    def gradients(op: Callable) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(op(tokens, frames, patches, newline)[0], (tokens, newline), grad)

    torch.testing.assert_close(gradients(forget), gradients(reference.forget), rtol=1e-5, atol=1e-4)
    benchmark(gradients, WAYS[way])
