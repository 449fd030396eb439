# SPDX-License-Identifier: Apache-2.0
"""Weighs each part of a query's attention by its share of the log-sum-exp; reads each part once."""

import triton
import triton.language as tl
from torch import Tensor

from hourllava_ext.triton.arguments import ROWS, WIDE, check
from hourllava_ext.triton.common import cover

ROWS_OF_A_PROGRAM = 16


@triton.jit
def _places(tokens, heads, BLOCK_R: tl.constexpr):
    """Rows (M, H) of a program, whether they exist, and their places in (H, M)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    return row, row < tokens * heads, (row % heads) * tokens + row // heads


@triton.jit
def _finite(x):
    """0 where no part saw a key yet: minus infinity from itself would be NaN."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def _merge(out, lse, merged, merged_lse, parts, tokens, heads, width, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row, exists, place = _places(tokens, heads, BLOCK_R)
    dim = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (dim < width)[None, :]
    count = tl.cast(tokens, tl.int64) * heads
    largest = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    sums = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for s in range(parts):
        part = tl.load(lse + s * count + place, mask=exists, other=-float("inf"))
        # A part that saw no key has nothing to say, whatever lies in its rows.
        seen = inside & (part != -float("inf"))[:, None]
        x = tl.load(out + ((s * count + row) * width)[:, None] + dim[None, :], mask=seen, other=0.0).to(tl.float32)
        shift = tl.maximum(largest, part)
        share = tl.exp(part - _finite(shift))
        kept = tl.exp(largest - _finite(shift))
        total = total * kept + share
        sums = sums * kept[:, None] + x * share[:, None]
        largest = shift
    nobody = total == 0
    mean = tl.div_rn(sums, tl.where(nobody, 1.0, total)[:, None])
    tl.store(merged + (row * width)[:, None] + dim[None, :], mean.to(merged.dtype.element_ty), mask=inside)
    joint = tl.where(nobody, -float("inf"), _finite(largest) + tl.log(tl.where(nobody, 1.0, total)))
    tl.store(merged_lse + place, joint, mask=exists)


@triton.jit
def _joint(lse, place, exists, parts, count, BLOCK_R: tl.constexpr):
    """The largest log-sum-exp of the parts, and the sum of the exponentials of their distances to it."""
    largest = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    for s in range(parts):
        largest = tl.maximum(largest, tl.load(lse + s * count + place, mask=exists, other=-float("inf")))
    shift = _finite(largest)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for s in range(parts):
        total += tl.exp(tl.load(lse + s * count + place, mask=exists, other=-float("inf")) - shift)
    return shift, tl.where(total == 0, 1.0, total)


@triton.jit
def _merge_backward(
    grad_merged, grad_merged_lse, out, lse, grad_out, grad_lse, parts, tokens, heads, width,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, exists, place = _places(tokens, heads, BLOCK_R)
    dim = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (dim < width)[None, :]
    count = tl.cast(tokens, tl.int64) * heads
    largest, total = _joint(lse, place, exists, parts, count, BLOCK_R)
    within = (row * width)[:, None] + dim[None, :]
    grad = tl.load(grad_merged + within, mask=inside, other=0.0).to(tl.float32)
    lse_grad = tl.load(grad_merged_lse + place, mask=exists, other=0.0)
    mean = tl.zeros((BLOCK_R,), tl.float32)
    for s in range(parts):
        part = tl.load(lse + s * count + place, mask=exists, other=-float("inf"))
        share = tl.div_rn(tl.exp(part - largest), total)
        at = s * count * width + within
        x = tl.load(out + at, mask=inside & (share != 0)[:, None], other=0.0).to(tl.float32)
        mean += share * tl.sum(grad * x, 1)
        tl.store(grad_out + at, (share[:, None] * grad).to(grad_out.dtype.element_ty), mask=inside)
    for s in range(parts):
        part = tl.load(lse + s * count + place, mask=exists, other=-float("inf"))
        share = tl.div_rn(tl.exp(part - largest), total)
        x = tl.load(out + s * count * width + within, mask=inside & (share != 0)[:, None], other=0.0).to(tl.float32)
        tl.store(grad_lse + s * count + place, share * (tl.sum(grad * x, 1) - mean + lse_grad), mask=exists)


def merge_attention(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    check("merge_attention", out=(out, "S M H D", ROWS), lse=(lse, "S H M", WIDE))
    parts, tokens, heads, width = out.shape
    merged, merged_lse = out.new_empty(tokens, heads, width), lse.new_empty(heads, tokens)
    _merge[(triton.cdiv(tokens * heads, ROWS_OF_A_PROGRAM),)](
        out.contiguous(), lse.contiguous(), merged, merged_lse, parts, tokens, heads, width,
        ROWS_OF_A_PROGRAM, cover(width),
    )  # fmt: skip
    return merged, merged_lse


def merge_attention_backward(
    grad_merged: Tensor, grad_merged_lse: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    check(
        "merge_attention_backward",
        out=(out, "S M H D", ROWS),
        lse=(lse, "S H M", WIDE),
        grad_merged=(grad_merged, "M H D", ROWS),
        grad_merged_lse=(grad_merged_lse, "H M", WIDE),
    )
    parts, tokens, heads, width = out.shape
    grad_out, grad_lse = out.new_empty(out.shape), lse.new_empty(lse.shape)
    _merge_backward[(triton.cdiv(tokens * heads, ROWS_OF_A_PROGRAM),)](
        grad_merged.contiguous(), grad_merged_lse.contiguous(), out.contiguous(), lse.contiguous(), grad_out, grad_lse,
        parts, tokens, heads, width, ROWS_OF_A_PROGRAM, cover(width),
    )  # fmt: skip
    return grad_out, grad_lse
