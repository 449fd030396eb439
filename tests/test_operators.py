# SPDX-License-Identifier: Apache-2.0
"""What every operator owes to a model of somebody's own, whatever it computes."""

import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tools import CPU_TIERS, assert_matches_reference, cpu_tier, frequencies
from torch import Tensor

import hourllava_ext
from hourllava_ext import merge_attention, page_write_, paged_attention, reference

# As float32: what an NVIDIA GPU computes, memory that was filled with ones, and another with low bits.
NANS = [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00001]
DIFFERENTIABLE = ["add_norm", "forget", "merge_attention", "page_write", "paged_attention", "pool_grid"]


def arguments() -> dict[str, list[Any]]:
    """Arguments of every operator, by its name."""
    rows, ids, where = torch.randn(6, 2, 16), torch.arange(6), [torch.arange(6), frequencies(4)]
    pages, lengths = torch.randn(3, 2, 4, 16), torch.tensor([4, 2, 0], dtype=torch.int32)
    table, cu_seqlens = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([0, 6])
    summary = torch.randn(3, 2, 3, 16)
    return {
        "add_norm": [rows[:, 0], rows[:, 1], torch.ones(16), torch.zeros(16)],
        "forget": [rows, ids[:3], torch.ones(3, 1, dtype=torch.int64), rows[0, 0]],
        "keyframe_score": [rows[:, 0]],
        "merge_attention": [rows[None], torch.zeros(1, 2, 6)],
        "page_write": [rows, rows + 1, ids, *where, 3, 4],
        "page_write_": [rows, rows + 1, ids, *where, pages.clone(), pages.clone(), summary, lengths],
        "paged_attention": [rows, pages, pages.clone(), table, lengths, ids, cu_seqlens, frequencies(4)],
        "pool_grid": [rows[:4].transpose(0, 1), 1],
        "retrieve": [rows, ids, cu_seqlens, frequencies(4), summary, table, lengths, 1],
        "rope": [rows, *where],
    }


def test_every_operator_is_here() -> None:
    assert set(arguments()) == set(hourllava_ext.__all__)


@pytest.mark.parametrize("name", arguments())
def test_the_default_device_is_no_concern(name: str) -> None:
    """Of the references neither, which stand in where a kernel lacks something, on a GPU as well."""
    args = arguments()[name]
    for function in (operator(name), getattr(reference, name)):
        expected, given = (_copies(args) for _ in range(2))
        results = function(*expected)
        with torch.device("meta"):
            torch.testing.assert_close(function(*given), results, rtol=0, atol=0)
        torch.testing.assert_close(given, expected, rtol=0, atol=0)


def _copies(args: list[Any]) -> list[Any]:
    return [a.clone() if isinstance(a, Tensor) else a for a in args]


def operator(name: str) -> Callable[..., Any]:
    return getattr(hourllava_ext, name)


@pytest.mark.parametrize("name", sorted(arguments().keys() - {"keyframe_score", "pool_grid"}))
def test_a_tensor_left_on_the_meta_device_is_an_error(name: str) -> None:
    """A call with one is sent there and computes nothing: its results would be whatever the memory held."""
    args = arguments()[name]
    tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    operator(name)(*args)
    everything = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
    operator(name)(*everything)
    for i in tensors:
        one = [*args[:i], args[i].to("meta"), *args[i + 1 :]]
        with pytest.raises(RuntimeError, match=f"{name}: all tensors must be on one device, got some on cpu and meta"):
            operator(name)(*one)


def test_what_does_not_fit_into_memory_says_so() -> None:
    """In the words by which torch's users know it, where the stable interface names a line of its own headers."""
    with pytest.raises(RuntimeError, match=r"^hourllava_ext: (out of memory\. |.*can't allocate memory)"):
        hourllava_ext.pool_grid(torch.zeros(1, 4, 30_000), 10**5)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_second_derivative_is_an_error_and_not_zero(name: str) -> None:
    args = arguments()[name]
    args[0] = args[0].clone().requires_grad_()
    out = operator(name)(*args)
    out = out if isinstance(out, Tensor) else out[0]
    (first,) = torch.autograd.grad(out.pow(2).sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}: has no second derivative; .* use hourllava_ext.reference.{name}"):
        first.pow(2).sum().backward()


def test_a_backward_finds_out_that_its_pages_were_written() -> None:
    arguments_of = arguments()
    query, keys, values, table, lengths, *rest = arguments_of["paged_attention"]
    rows = arguments_of["page_write_"][:5]
    summary = torch.zeros(3, 2, 3, 16)
    out, _ = paged_attention(query.requires_grad_(), keys, values, table, lengths, *rest)
    page_write_(*rows, keys, values, summary, lengths)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    with torch.inference_mode():
        pools = [torch.zeros_like(p) for p in (keys, values, summary, lengths)]
    page_write_(*rows, *pools)
    assert pools[3].tolist() == [4, 2, 0]


@pytest.mark.parametrize("bits", NANS, ids=hex)
@pytest.mark.parametrize("tier", CPU_TIERS)
def test_every_nan_stays_one(tier: str, bits: int) -> None:
    nan = torch.frombuffer(bytearray(struct.pack("<I", bits)), dtype=torch.float32)
    query, keys, values, *rest = arguments()["paged_attention"]
    keys[0, 1, 2, 5] = nan
    lse = torch.randn(3, 2, 6)
    lse[1, 1, 4] = nan
    with cpu_tier(tier):
        out, sums = paged_attention(query, keys, values, *rest)
        merged, joint = merge_attention(torch.randn(3, 6, 2, 16), lse)
    assert out[:, 1].isnan().all()
    assert sums[1].isnan().all()
    assert out[:, 0].isfinite().all()
    assert merged[4, 1].isnan().all()
    assert joint.isnan().nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize("tier", CPU_TIERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_of_minus_infinity_weigh_nothing(dtype: torch.dtype, tier: str) -> None:
    """Wherever they come: here the first page has no others."""
    query, keys, values, *rest, _ = arguments()["paged_attention"]
    args = [query.abs().to(dtype), keys.to(dtype), values.to(dtype), *rest, torch.empty(0)]
    args[1][0, :, :, 3] = -torch.inf
    with cpu_tier(tier):
        assert_matches_reference(paged_attention, reference.paged_attention, *args)
