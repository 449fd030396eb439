# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from tools import (
    CPU_TIERS,
    DTYPES,
    assert_compiles_fullgraph,
    assert_error_rule,
    assert_matches_reference,
    assert_repeatable,
    cpu_tier,
)
from torch import Tensor

from hourllava_ext import merge_attention, reference

# Parts, tokens, heads, width.
SHAPES = [(2, 63, 2, 33), (7, 5, 3, 16), (1, 4, 2, 8), (3, 1, 1, 1), (3, 0, 2, 8), (3, 4, 0, 8), (3, 4, 2, 0)]


def make(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    parts, tokens, heads, width = shape
    out = torch.randn(parts, tokens, heads, width, dtype=dtype, requires_grad=True)
    lse_dtype = reference.accumulate_dtype(dtype)
    return out, (3 * torch.randn(parts, heads, tokens, dtype=lse_dtype)).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_matches_reference(merge_attention, reference.merge_attention, *make(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_make_the_whole(dtype: torch.dtype) -> None:
    """Softmax attention over all keys equals the merge of attention over three shares of them."""
    query, key, value = (torch.randn(n, 2, 16, dtype=torch.float64) for n in (9, 50, 50))

    def attend(keys: slice) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("mhd,khd->hmk", query, key[keys])
        return torch.einsum("hmk,khd->mhd", scores.softmax(-1), value[keys]), scores.logsumexp(-1)

    outs, lses = zip(*(attend(keys) for keys in (slice(0, 7), slice(7, 8), slice(8, 50))), strict=True)
    lse_dtype = reference.accumulate_dtype(dtype)
    parts = torch.stack(outs).to(dtype), torch.stack(lses).to(lse_dtype)
    for values in zip(merge_attention(*parts), reference.merge_attention(*parts), attend(slice(None)), strict=True):
        assert_error_rule(*values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_part_adds_nothing(dtype: torch.dtype) -> None:
    out, lse = (x.detach() for x in make((3, 5, 2, 8), dtype))
    out[1], lse[1] = torch.nan, -torch.inf
    out.requires_grad_()
    lse.requires_grad_()
    merged, total = merge_attention(out, lse)
    alone, alone_total = merge_attention(out[::2], lse[::2])
    torch.testing.assert_close(merged, alone, rtol=0, atol=0)
    torch.testing.assert_close(total, alone_total, rtol=0, atol=0)
    grad_out, grad_lse = torch.autograd.grad([merged, total], [out, lse], [merged.detach(), total.detach()])
    assert grad_out.isfinite().all()
    assert grad_lse.isfinite().all()
    assert not grad_out[1].any()
    assert not grad_lse[1].any()


@pytest.mark.parametrize("tier", CPU_TIERS[:-1])
def test_every_float16(tier: str) -> None:
    """Loading and rounding to nearest even, subnormals, infinities and NaN included: two numbers make their mean."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    # The mean with a neighbour is a tie, with zero a smaller number, with any other sometimes far larger.
    for other in (every, every.roll(1), torch.zeros_like(every), every[torch.randperm(len(every))]):
        with cpu_tier(tier):
            mean, _ = merge_attention(torch.stack([every, other]).view(2, 64, 1, 1024), torch.zeros(2, 1, 64))
        expected = ((every.float() + other.float()) / 2).half()
        torch.testing.assert_close(mean.flatten(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("parts", [0, 1, 3])
def test_no_part_saw_a_key(parts: int) -> None:
    out, lse = make((parts, 4, 2, 8), torch.float32)
    lse = torch.full_like(lse, -torch.inf, requires_grad=True)
    merged, total = merge_attention(out, lse)
    assert torch.equal(merged, torch.zeros(4, 2, 8))
    assert torch.equal(total, torch.full((2, 4), -torch.inf))
    gradients = torch.autograd.grad([merged, total], [out, lse], [torch.ones_like(merged), torch.ones_like(total)])
    assert not any(g.any() for g in gradients)


def test_large_log_sums() -> None:
    out, lse = make((3, 5, 2, 8), torch.float32)
    merged, total = merge_attention(out, lse + 1e4)
    assert merged.isfinite().all()
    torch.testing.assert_close(total, merge_attention(out, lse)[1] + 1e4, rtol=1e-6, atol=0)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(merge_attention, make((3, 4, 2, 5), torch.float64))


def test_opcheck() -> None:
    ops = torch.ops.hourllava_ext
    out, lse = make((3, 4, 2, 5), torch.float32)
    torch.library.opcheck(ops.merge_attention.default, (out, lse))
    grads = torch.randn(4, 2, 5), torch.randn(2, 4)
    torch.library.opcheck(ops.merge_attention_backward.default, (*grads, out.detach(), lse.detach()))


def test_compile_fullgraph() -> None:
    assert_compiles_fullgraph(merge_attention, *make((3, 4, 2, 5), torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeatable(dtype: torch.dtype) -> None:
    assert_repeatable(merge_attention, *make((4, 333, 3, 24), dtype))


def test_bad_arguments() -> None:
    out, lse = make((3, 4, 2, 5), torch.float32)
    with pytest.raises(RuntimeError, match=r"out must be \(S, M, H, D\), got shape \(4, 2, 5\)"):
        merge_attention(out[0], lse)
    with pytest.raises(RuntimeError, match=r"lse must have shape \(3, 2, 4\), got \(3, 4, 2\)"):
        merge_attention(out, lse.transpose(1, 2))
    with pytest.raises(RuntimeError, match="lse must be float32, or float64 for a float64 out"):
        merge_attention(out, lse.double())
    with pytest.raises(RuntimeError, match="lse must be float32, or float64 for a float64 out"):
        merge_attention(out.bfloat16(), lse.bfloat16())
    with pytest.raises(RuntimeError, match="out must be float32, float16, bfloat16 or float64"):
        merge_attention(out.int(), lse)


def test_bad_backward_arguments() -> None:
    backward = torch.ops.hourllava_ext.merge_attention_backward
    out, lse = (x.detach() for x in make((3, 4, 2, 5), torch.float32))
    with pytest.raises(RuntimeError, match=r"grad_merged must have shape \(4, 2, 5\), got \(3, 4, 2, 5\)"):
        backward(out, lse[0], out, lse)
    with pytest.raises(RuntimeError, match=r"grad_merged_lse must have shape \(2, 4\), got \(3, 2, 4\)"):
        backward(out[0], lse, out, lse)
    with pytest.raises(RuntimeError, match="grad_merged must have the dtype of out"):
        backward(out[0].double(), lse[0], out, lse)
    with pytest.raises(RuntimeError, match="grad_merged_lse must have the dtype of lse"):
        backward(out[0], lse[0].double(), out, lse)
