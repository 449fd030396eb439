# SPDX-License-Identifier: Apache-2.0
"""Copies the kept rows; the backward finds, for each token, the rows it became, so no two programs add to one place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hourllava_ext.triton.arguments import INT64, ROWS, check
from hourllava_ext.triton.common import block


@triton.jit
def _forget(tokens, frames, patches, newline, kept, position_ids, kept_patches, per_frame, width, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)  # in (n, k + 1)
    frame_place = place // (kept_patches + 1)
    column = place % (kept_patches + 1)
    is_newline = column == kept_patches
    frame = tl.load(frames + frame_place)
    patch = tl.load(patches + frame_place * kept_patches + column, mask=column < kept_patches, other=per_frame)
    tl.store(position_ids + place, frame * (per_frame + 1) + patch)
    source = (frame * per_frame + patch) * width
    for begin in range(0, width, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        row = tl.load(tokens + source + c, mask=(c < width) & (column < kept_patches), other=0.0)
        last = tl.load(newline + c, mask=(c < width) & is_newline, other=0.0)
        tl.store(kept + place * width + c, tl.where(is_newline, last, row), mask=c < width)


@triton.jit
def _sum_rows(grad, order, starts, grad_tokens, kept_patches, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    first = tl.load(starts + token)
    last = tl.load(starts + token + 1)
    for begin in range(0, width, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(first, last):
            pick = tl.load(order + i)  # in (n, k)
            row = (pick // kept_patches) * (kept_patches + 1) + pick % kept_patches
            total += tl.load(grad + row * width + c, mask=c < width, other=0.0).to(tl.float32)
        tl.store(grad_tokens + token * width + c, total.to(grad_tokens.dtype.element_ty), mask=c < width)


@triton.jit
def _sum_newlines(grad, grad_newline, kept_frames, kept_patches, width, BLOCK: tl.constexpr):
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # Hundreds of terms, so they are summed in double.
    total = tl.zeros((BLOCK,), tl.float64)
    for i in range(kept_frames):
        row = tl.cast(i, tl.int64) * (kept_patches + 1) + kept_patches
        total += tl.load(grad + row * width + c, mask=c < width, other=0.0).to(tl.float64)
    tl.store(grad_newline + c, total.to(tl.float32).to(grad_newline.dtype.element_ty), mask=c < width)


def forget(tokens: Tensor, frames: Tensor, patches: Tensor, newline: Tensor) -> tuple[Tensor, Tensor]:
    check(
        "forget",
        tokens=(tokens, "T N C", ROWS),
        frames=(frames, "n", INT64),
        patches=(patches, "n k", INT64),
        newline=(newline, "C", ROWS),
    )
    (_, per_frame, width), (n, k) = tokens.shape, patches.shape
    kept, position_ids = tokens.new_empty(n, k + 1, width), frames.new_empty(n, k + 1)
    _forget[(n * (k + 1),)](
        tokens.contiguous(), frames.contiguous(), patches.contiguous(), newline.contiguous(), kept, position_ids,
        k, per_frame, width, block(width, most=2048),
    )  # fmt: skip
    return kept, position_ids


def forget_backward(grad: Tensor, frames: Tensor, patches: Tensor, total: int, per_frame: int) -> tuple[Tensor, Tensor]:
    check("forget_backward", grad=(grad, "n k+1 C", ROWS), frames=(frames, "n", INT64), patches=(patches, "n k", INT64))
    (n, k), width = patches.shape, grad.shape[2]
    grad_tokens, grad_newline = grad.new_empty(total, per_frame, width), grad.new_empty(width)
    # The rows that each token became, ascending: order[starts[r]] to order[starts[r + 1]].
    sorted_tokens, order = (frames[:, None] * per_frame + patches).flatten().sort(stable=True)
    starts = torch.searchsorted(sorted_tokens, torch.arange(total * per_frame + 1, device=grad.device))
    rows = grad.contiguous()
    _sum_rows[(total * per_frame,)](rows, order, starts, grad_tokens, k, width, block(width))
    _sum_newlines[(triton.cdiv(width, 128),)](rows, grad_newline, n, k, width, 128)
    return grad_tokens, grad_newline
