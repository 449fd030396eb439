# SPDX-License-Identifier: Apache-2.0
"""MemAug on a GPU: its kernels give what the book says, nothing waits for the device, and a CUDA graph replays it."""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from block_by_the_book import by_the_book, make_case
from tools import assert_error_rule
from torch import Tensor

from hourllava.model.memaug import MemoryUse, PageBudget

ROOT = Path(__file__).resolve().parents[2]
no_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NO GPU: replay is NOT TESTED; tests/model/test_memaug.py tests its condition"
)


def to(device: str, value: Any) -> Any:
    """A tensor, or a dataclass of some, on a device."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: to(device, getattr(value, f.name)) for f in fields(value)})
    return value.to(device) if isinstance(value, Tensor) else value


def test_block_by_the_book(device: str, dtype: torch.dtype) -> None:
    """Values and gradients, by the error rule."""
    memaug, queries, stream, tokens, layout = make_case((7, 4), (9, 5), dtype)

    def run(function: Any, *args: Any) -> list[Tensor]:
        leaves = [args[0].requires_grad_(), args[2].requires_grad_()]
        out = function(*args)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        weights = [memaug.layers[0].norm1.weight, memaug.layers[0].self_attn.Wqkv.weight]
        return [t.detach().cpu() for t in (out, *torch.autograd.grad(out, [*leaves, *weights], cotangent))]

    def ours(queries: Tensor, stream: Any, tokens: Tensor, layout: Any) -> Tensor:
        return memaug(queries, stream, memaug.write(tokens, layout))[0]

    def plain(*args: Any) -> Tensor:
        return by_the_book(memaug, *args)

    given = queries, stream, tokens, layout
    expected = run(plain, *(a.clone() if isinstance(a, Tensor) else a for a in given))
    memaug.to(device)
    got = run(ours, *(to(device, a.clone() if isinstance(a, Tensor) else a) for a in given))
    memaug.to("cpu", torch.float64)
    exact = run(plain, *(a.double() if isinstance(a, Tensor) else a for a in given))
    names = ("out", "queries", "tokens", "norm1", "Wqkv")
    for name, *values in zip(names, got, expected, exact, strict=True):
        assert_error_rule(*values, name)


def test_no_cache_is_emptied() -> None:
    """It would make the host wait for the device, and the next call ask the driver again."""
    sources = [*ROOT.glob("python/**/*.py"), *ROOT.glob("hourllava_ext/**/*.py")]
    assert len(sources) > 50
    assert [path.name for path in sources if "empty_cache" in path.read_text()] == []


@no_gpu
@pytest.mark.parametrize("budget", [None, PageBudget(3), PageBudget(3, tile=16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_graph_replays_a_question_of_fixed_length(dtype: torch.dtype, budget: PageBudget | None) -> None:
    memaug, first, stream, tokens, layout = (to("cuda", x) for x in make_case((40,), (60,), dtype))
    memaug.to("cuda")
    pages = memaug.write(tokens, layout)
    use = MemoryUse(budget=budget, mass_weight=torch.rand(len(first), device=first.device))
    second = torch.randn_like(first)
    expected = memaug(second, stream, pages, use)
    torch.cuda.set_sync_debug_mode("error")
    try:
        memaug(first, stream, pages, use)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    queries, graph, aside = first.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        memaug(queries, stream, pages, use)
    torch.cuda.current_stream().wait_stream(aside)
    with torch.cuda.graph(graph):
        out, mass = memaug(queries, stream, pages, use)
    queries.copy_(second)
    graph.replay()
    assert torch.equal(out, expected[0])
    torch.testing.assert_close(mass, expected[1])  # a scan adds up weights in no fixed order
