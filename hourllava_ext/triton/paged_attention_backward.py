# SPDX-License-Identifier: Apache-2.0
"""The gradients of paged attention: one program owns a page of a key head, another a tile of query rows.

No two programs add to one place, so runs repeat bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hourllava_ext.triton.arguments import ROWS, WIDE
from hourllava_ext.triton.common import find_tile
from hourllava_ext.triton.paged_attention import LOG2E, Shape, checked, page_part, query_rows
from hourllava_ext.triton.rope import rope


@triton.jit
def _delta(grad_out, grad_lse, out, delta, tokens, heads, width, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """What every score's gradient loses: grad_out . out - grad_lse, (Hq, M)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = row < tokens * heads
    d = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (d < width)[None, :]
    at = (row * width)[:, None] + d[None, :]
    product = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
    product *= tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    place = (row % heads) * tokens + row // heads
    tl.store(delta + place, tl.sum(product, 1) - tl.load(grad_lse + place, mask=exists, other=0.0), mask=exists)


@triton.jit
def _rows(
    turned, grad_out, lse, delta, token, query_head, exists, tokens, query_heads, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile's queries and output gradients, and its rows' log-sum-exps and deltas."""
    d = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (d < WIDTH)[None, :]
    at = ((token * query_heads + query_head) * WIDTH)[:, None] + d[None, :]
    q = tl.load(turned + at, mask=inside, other=0.0)
    do = tl.load(grad_out + at, mask=inside, other=0.0)
    place = query_head.to(tl.int64) * tokens + token
    # Rows that do not exist, or saw no key, weigh nothing: their softmax is over infinity.
    joint = tl.load(lse + place, mask=exists, other=float("inf"))
    joint = tl.where(joint == -float("inf"), float("inf"), joint)
    return q, do, joint, tl.load(delta + place, mask=exists, other=0.0)


@triton.jit
def _page_gradients(
    turned, key_pages, value_pages, page_lengths, cu_seqlens, entries, starts, grad_out, lse, delta, grad_keys,
    grad_values, scale, tokens, listed, page_size, query_heads, key_heads,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    parts = (page_size + BLOCK_N - 1) // BLOCK_N
    page = (tl.program_id(0) // parts).to(tl.int64)
    key = (tl.program_id(0) % parts) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    offsets = (((page * key_heads + head) * page_size + key) * WIDTH)[:, None] + d[None, :]
    valid = key < tl.load(page_lengths + page)
    there = valid[:, None] & (d < WIDTH)[None, :]
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    k = tl.load(key_pages + offsets, mask=there, other=0.0)
    v = tl.load(value_pages + offsets, mask=there, other=0.0)
    # The samples that list the page, ascending.
    for entry in range(tl.load(starts + page), tl.load(starts + page + 1)):
        sample = tl.load(entries + entry) // listed
        first_token = tl.load(cu_seqlens + sample)
        rows = (tl.load(cu_seqlens + sample + 1) - first_token) * GROUP
        for row in range(0, rows, BLOCK_M):
            token, query_head, exists = query_rows(first_token, row, rows, head, query_heads, GROUP, BLOCK_M)
            q, do, joint, lost = _rows(
                turned, grad_out, lse, delta, token, query_head, exists, tokens, query_heads, WIDTH, BLOCK_D
            )
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # (keys, rows)
            p = tl.where(valid[:, None], tl.exp2((scores - joint[None, :]) * LOG2E), 0.0)
            grad_v = tl.dot(p.to(do.dtype), do, grad_v, input_precision="ieee")
            grad_p = tl.dot(v, tl.trans(do), input_precision="ieee")
            grad_s = p * (grad_p - lost[None, :])
            grad_k = tl.dot(grad_s.to(q.dtype), q, grad_k, input_precision="ieee")
    stored = (key < page_size)[:, None] & (d < WIDTH)[None, :]
    tl.store(grad_keys + offsets, (grad_k * scale).to(grad_keys.dtype.element_ty), mask=stored)
    tl.store(grad_values + offsets, grad_v.to(grad_values.dtype.element_ty), mask=stored)


@triton.jit
def _query_gradients(
    turned, key_pages, value_pages, page_table, page_lengths, first_page, cu_seqlens, grad_out, lse, delta, grad_query,
    scale, tokens, batch, listed, page_size, query_heads, key_heads,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    sample, first_token, rows, row = find_tile(tl.program_id(0), cu_seqlens, batch, GROUP, BLOCK_M)
    if sample >= 0:
        token, query_head, exists = query_rows(first_token, row, rows, head, query_heads, GROUP, BLOCK_M)
        q, do, joint, lost = _rows(
            turned, grad_out, lse, delta, token, query_head, exists, tokens, query_heads, WIDTH, BLOCK_D
        )
        grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        parts = (page_size + BLOCK_N - 1) // BLOCK_N
        for step in range(tl.load(first_page + sample) * parts, listed * parts):
            offsets, valid, there = page_part(
                page_table, page_lengths, sample.to(tl.int64) * listed, step, head, key_heads, page_size,
                WIDTH, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            k = tl.load(key_pages + offsets, mask=there, other=0.0)
            v = tl.load(value_pages + offsets, mask=there, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            p = tl.where(valid[None, :], tl.exp2((scores - joint[:, None]) * LOG2E), 0.0)
            grad_p = tl.dot(do, tl.trans(v), input_precision="ieee")
            grad_s = p * (grad_p - lost[:, None])
            grad_q = tl.dot(grad_s.to(k.dtype), k, grad_q, input_precision="ieee")
        d = tl.arange(0, BLOCK_D)
        at = ((token * query_heads + query_head) * WIDTH)[:, None] + d[None, :]
        inside = exists[:, None] & (d < WIDTH)[None, :]
        tl.store(grad_query + at, (grad_q * scale).to(grad_query.dtype.element_ty), mask=inside)


def paged_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    page_lengths: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    inv_freq: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = [query, key_pages, value_pages, page_table, page_lengths, position_ids, cu_seqlens, inv_freq]
    shape = checked(
        "paged_attention_backward",
        tensors,
        grad_out=(grad_out, "M Hq D", ROWS),
        out=(out, "M Hq D", ROWS),
        grad_lse=(grad_lse, "Hq M", WIDE),
        lse=(lse, "Hq M", WIDE),
    )
    query, key_pages, value_pages, page_table, page_lengths, position_ids, cu_seqlens, inv_freq = (
        t.contiguous() for t in tensors
    )
    grad_out, out, lse = grad_out.contiguous(), out.contiguous(), lse.contiguous()
    turned = rope(query, position_ids, inv_freq)
    delta = torch.empty_like(lse)
    _delta[(triton.cdiv(shape.tokens * shape.query_heads, 16),)](
        grad_out, grad_lse.contiguous(), out, delta, shape.tokens, shape.query_heads, shape.width, 16, shape.block_d
    )
    saved = [grad_out, lse, delta]
    pages = [turned, key_pages, value_pages]
    grad_query = _grad_query(shape, pages, page_table, page_lengths, cu_seqlens, saved, scale)
    grad_keys, grad_values = _grad_pages(shape, pages, page_table, page_lengths, cu_seqlens, saved, scale)
    return rope(grad_query, position_ids, inv_freq, inverse=True), grad_keys, grad_values


def _grad_query(
    shape: Shape,
    pages: list[Tensor],
    page_table: Tensor,
    page_lengths: Tensor,
    cu_seqlens: Tensor,
    saved: list[Tensor],
    scale: float,
) -> Tensor:
    """Gradient of the rotated queries."""
    grad_query = torch.empty_like(pages[0])
    ascending = page_table.sort(dim=1).values
    first_page = (page_table < 0).sum(1, dtype=torch.int32)
    block_m, block_n = shape.block_m, min(shape.rows_in(8192), shape.block_n)
    _query_gradients[(shape.tiles(block_m), shape.key_heads)](
        *pages, ascending, page_lengths, first_page, cu_seqlens, *saved, grad_query, scale,
        shape.tokens, shape.batch, shape.listed, shape.page_size, shape.query_heads, shape.key_heads,
        shape.group, shape.width, block_m, block_n, shape.block_d, num_warps=8, num_stages=2,
    )  # fmt: skip
    return grad_query


def _grad_pages(
    shape: Shape,
    pages: list[Tensor],
    page_table: Tensor,
    page_lengths: Tensor,
    cu_seqlens: Tensor,
    saved: list[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the rotated keys and the values, zeros where nobody looked."""
    grad_keys, grad_values = torch.empty_like(pages[1]), torch.empty_like(pages[2])
    # Entries of the table by page: entries[starts[page]] to entries[starts[page + 1]], ascending.
    listed_pages, entries = page_table.flatten().sort(stable=True)
    every = torch.arange(shape.pages + 1, dtype=torch.int32, device=page_table.device)
    starts = torch.searchsorted(listed_pages, every)
    block_m = min(shape.rows_in(8192), shape.block_m)
    _page_gradients[(shape.pages * triton.cdiv(shape.page_size, shape.block_n), shape.key_heads)](
        *pages, page_lengths, cu_seqlens, entries, starts, *saved, grad_keys, grad_values, scale,
        shape.tokens, shape.listed, shape.page_size, shape.query_heads, shape.key_heads,
        shape.group, shape.width, block_m, shape.block_n, shape.block_d, num_warps=8, num_stages=2,
    )  # fmt: skip
    return grad_keys, grad_values
