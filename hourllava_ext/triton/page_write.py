# SPDX-License-Identifier: Apache-2.0
"""Rotated keys and values to their rows of the pages, then the summaries of the pages that were touched.

A summary is recomputed from the stored rows, so it does not depend on how the writes were grouped.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hourllava_ext.triton.arguments import INT32, INT64, ROWS, WIDE, check, check_rotation, require
from hourllava_ext.triton.common import block, cover, partner, rotation, turn

TOKENS = 16


@triton.jit
def _write(
    key, value, position_ids, slots, inv_freq, key_pages, value_pages, page_lengths, touched, tokens, heads, page_size,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    WIDTH: tl.constexpr, FREQUENCIES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = token < tokens
    dim = tl.arange(0, BLOCK_D)
    other = partner(dim, FREQUENCIES)
    inside = exists[:, None] & (dim < WIDTH)[None, :]
    slot = tl.load(slots + token, mask=exists, other=0)
    page = slot // page_size
    row = slot % page_size
    tl.atomic_max(page_lengths + page, (row + 1).to(tl.int32), mask=exists)
    tl.store(touched + page, 1, mask=exists)
    position = tl.load(position_ids + token, mask=exists, other=0)
    cosine, sine = rotation(position, dim, inv_freq, FREQUENCIES, key.dtype.element_ty)
    for head in range(heads):
        to = (((page * heads + head) * page_size + row) * WIDTH)[:, None] + dim[None, :]
        rows = key + (token * key_token_stride + tl.cast(head, tl.int64) * key_head_stride)[:, None]
        a = tl.load(rows + dim[None, :], mask=inside)
        b = tl.load(rows + other[None, :], mask=inside)
        turned = turn(a, b, cosine, sine, dim, FREQUENCIES)
        tl.store(key_pages + to, turned.to(key_pages.dtype.element_ty), mask=inside)
        rows = value + (token * value_token_stride + tl.cast(head, tl.int64) * value_head_stride)[:, None]
        tl.store(value_pages + to, tl.load(rows + dim[None, :], mask=inside), mask=inside)


@triton.jit
def _summarize(
    key_pages, key_summary, page_lengths, touched, heads, page_size, width, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64)  # in (P, Hkv)
    page = place // heads
    dim = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if tl.load(touched + page) != 0:
        filled = tl.load(page_lengths + page)
        total = tl.zeros((BLOCK_S, BLOCK_D), tl.float64)
        low = tl.full((BLOCK_S, BLOCK_D), float("inf"), tl.float32)
        high = tl.full((BLOCK_S, BLOCK_D), -float("inf"), tl.float32)
        for begin in range(0, filled, BLOCK_S):
            row = begin + tl.arange(0, BLOCK_S)
            inside = (row < filled)[:, None] & (dim < width)[None, :]
            at = ((place * page_size + row) * width)[:, None] + dim[None, :]
            x = tl.load(key_pages + at, mask=inside, other=0.0).to(tl.float32)
            total += x.to(tl.float64)
            low = tl.where(inside, tl.minimum(low, x), low)
            high = tl.where(inside, tl.maximum(high, x), high)
        summary = key_summary + place * 3 * width + dim
        mean = tl.sum(total, 0) / filled.to(tl.float64)
        tl.store(summary, mean.to(tl.float32), mask=dim < width)
        tl.store(summary + width, tl.min(low, 0), mask=dim < width)
        tl.store(summary + 2 * width, tl.max(high, 0), mask=dim < width)


@triton.jit
def _write_backward(
    grad_key_pages, grad_value_pages, position_ids, slots, inv_freq, grad_key, grad_value, tokens, heads, page_size,
    WIDTH: tl.constexpr, FREQUENCIES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = token < tokens
    dim = tl.arange(0, BLOCK_D)
    other = partner(dim, FREQUENCIES)
    inside = exists[:, None] & (dim < WIDTH)[None, :]
    slot = tl.load(slots + token, mask=exists, other=0)
    position = tl.load(position_ids + token, mask=exists, other=0)
    cosine, sine = rotation(position, dim, inv_freq, FREQUENCIES, grad_key.dtype.element_ty)
    for head in range(heads):
        place = (slot // page_size * heads + head) * page_size + slot % page_size
        source = (place * WIDTH)[:, None]
        to = ((token * heads + head) * WIDTH)[:, None] + dim[None, :]
        a = tl.load(grad_key_pages + source + dim[None, :], mask=inside)
        b = tl.load(grad_key_pages + source + other[None, :], mask=inside)
        turned = turn(a, b, cosine, -sine, dim, FREQUENCIES)
        tl.store(grad_key + to, turned.to(grad_key.dtype.element_ty), mask=inside)
        tl.store(grad_value + to, tl.load(grad_value_pages + source + dim[None, :], mask=inside), mask=inside)


def _fill(rows: list[Tensor], pools: list[Tensor]) -> None:
    """Writes checked ``page_write`` rows into zeroed or existing pools."""
    key, value = (x if x.stride(2) == 1 else x.contiguous() for x in rows[:2])
    position_ids, slots, inv_freq = (x.contiguous() for x in rows[2:])
    key_pages, value_pages, key_summary, page_lengths = pools
    (tokens, heads, width), (pages, _, page_size, _) = key.shape, key_pages.shape
    touched = torch.zeros_like(page_lengths)
    _write[(triton.cdiv(tokens, TOKENS),)](
        key, value, position_ids, slots, inv_freq, key_pages, value_pages, page_lengths, touched,
        tokens, heads, page_size, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        width, inv_freq.shape[0], TOKENS, cover(width),
    )  # fmt: skip
    _summarize[(pages * heads, triton.cdiv(width, 128))](
        key_pages, key_summary, page_lengths, touched, heads, page_size, width, TOKENS, block(width, most=128)
    )


def page_write(
    key: Tensor,
    value: Tensor,
    position_ids: Tensor,
    slots: Tensor,
    inv_freq: Tensor,
    num_pages: int,
    page_size: int = 128,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = [key, value, position_ids, slots, inv_freq]
    sizes = _check_rows("page_write", rows)
    require(
        num_pages >= 0 and page_size > 0,
        f"page_write: num_pages must be at least 0 and page_size at least 1, got {num_pages} and {page_size}",
    )
    heads, width = sizes["Hkv"], sizes["D"]
    key_pages, value_pages = (key.new_zeros(num_pages, heads, page_size, width) for _ in range(2))
    key_summary = key.new_zeros(num_pages, heads, 3, width, dtype=torch.float32)
    page_lengths = key.new_zeros(num_pages, dtype=torch.int32)
    _fill(rows, [key_pages, value_pages, key_summary, page_lengths])
    return key_pages, value_pages, key_summary, page_lengths


def _check_rows(op: str, rows: list[Tensor], **pools: tuple[Tensor, str, tuple[torch.dtype, ...]]) -> dict[str, int]:
    key, value, position_ids, slots, inv_freq = rows
    sizes = check(
        op,
        key=(key, "M Hkv D", ROWS),
        value=(value, "M Hkv D", ROWS),
        position_ids=(position_ids, "M", INT64),
        slots=(slots, "M", INT64),
        inv_freq=(inv_freq, "F", (torch.float32,)),
        **pools,
    )
    check_rotation(op, sizes)
    return sizes


def _apart(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have no byte in common, by the first and the last that each can reach."""

    def end(x: Tensor) -> int:
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        return x.data_ptr() + (last + 1) * x.element_size()

    return not a.numel() or not b.numel() or end(a) <= b.data_ptr() or end(b) <= a.data_ptr()


def page_write_(
    key: Tensor,
    value: Tensor,
    position_ids: Tensor,
    slots: Tensor,
    inv_freq: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    key_summary: Tensor,
    page_lengths: Tensor,
) -> None:
    rows, pools = [key, value, position_ids, slots, inv_freq], [key_pages, value_pages, key_summary, page_lengths]
    _check_rows(
        "page_write_",
        rows,
        key_pages=(key_pages, "P Hkv S D", ROWS),
        value_pages=(value_pages, "P Hkv S D", ROWS),
        key_summary=(key_summary, "P Hkv 3 D", WIDE),
        page_lengths=(page_lengths, "P", INT32),
    )
    require(all(p.is_contiguous() for p in pools), "page_write_: pools are written in place and must be contiguous")
    require(
        _apart(key_pages, value_pages),
        "page_write_: key_pages and value_pages are written in place and must not share memory",
    )
    # As they were before any was written, as when a page is moved.
    rows[:2] = [x if _apart(x, key_pages) and _apart(x, value_pages) else x.clone() for x in rows[:2]]
    _fill(rows, pools)


def page_write_backward(
    grad_key_pages: Tensor, grad_value_pages: Tensor, position_ids: Tensor, slots: Tensor, inv_freq: Tensor
) -> tuple[Tensor, Tensor]:
    sizes = check(
        "page_write_backward",
        grad_key_pages=(grad_key_pages, "P Hkv S D", ROWS),
        grad_value_pages=(grad_value_pages, "P Hkv S D", ROWS),
        position_ids=(position_ids, "M", INT64),
        slots=(slots, "M", INT64),
        inv_freq=(inv_freq, "F", (torch.float32,)),
    )
    check_rotation("page_write_backward", sizes)
    tokens, heads, width = sizes["M"], sizes["Hkv"], sizes["D"]
    grad_key, grad_value = (grad_key_pages.new_empty(tokens, heads, width) for _ in range(2))
    _write_backward[(triton.cdiv(tokens, TOKENS),)](
        grad_key_pages.contiguous(), grad_value_pages.contiguous(), position_ids.contiguous(), slots.contiguous(),
        inv_freq.contiguous(), grad_key, grad_value, tokens, heads, sizes["S"],
        width, inv_freq.shape[0], TOKENS, cover(width),
    )  # fmt: skip
    return grad_key, grad_value
