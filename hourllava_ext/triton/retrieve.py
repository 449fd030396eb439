# SPDX-License-Identifier: Apache-2.0
"""Scores the pages of each sample by the largest product any of their keys could have with a query; keeps the best.

Two passes over the summaries, one for each query's softmax, one that adds the weights up; the choice is made by sorts.
Nothing waits for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hourllava_ext.triton.arguments import BOOL, INT32, INT64, ROWS, WIDE, check, check_groups, check_rotation, require
from hourllava_ext.triton.common import cover, find_tile
from hourllava_ext.triton.rope import rope

TILE = 32  # rows, tokens x heads of a group, by so many pages
TILE_NUMBERS = 4096  # that a tile has of its rows' dims, and of its pages', so that every GPU has the shared memory
NO_PAGE = 2**31 - 1


@triton.jit
def _bounds(
    query, key_summary, page_table, page_lengths, token, row, rows, head, sample, first_page, listed, heads, key_heads,
    scale, WIDTH: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scaled bounds (rows, pages) plus the logarithms of the lengths; minus infinity where there is no page."""
    group = heads // key_heads
    r = row + tl.arange(0, BLOCK_R)
    d = FIRST + tl.arange(0, BLOCK_D)
    place = (token + r // group) * heads + head * group + r % group
    at = (place * WIDTH)[:, None] + d[None, :]
    q = tl.load(query + at, mask=(r < rows)[:, None] & (d < LAST)[None, :], other=0.0).to(tl.float32)
    w = first_page + tl.arange(0, BLOCK_P)
    page = tl.load(page_table + sample.to(tl.int64) * listed + w, mask=w < listed, other=-1).to(tl.int64)
    length = tl.load(page_lengths + page, mask=page >= 0, other=0)
    box = key_summary + ((page * key_heads + head) * 3 * WIDTH)[None, :] + d[:, None]
    there = (length > 0)[None, :] & (d < LAST)[:, None]
    low = tl.load(box + WIDTH, mask=there, other=0.0)
    high = tl.load(box + 2 * WIDTH, mask=there, other=0.0)
    bound = tl.dot(tl.maximum(q, 0.0), high, input_precision="ieee")
    bound = tl.dot(tl.minimum(q, 0.0), low, bound, input_precision="ieee")
    known = tl.log(tl.maximum(length, 1).to(tl.float32))
    return tl.where((length > 0)[None, :], bound * scale + known[None, :], -float("inf"))


@triton.jit
def _normalize(
    query, key_summary, page_table, page_lengths, cu_seqlens, lse, tokens, listed, heads, key_heads, batch, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    sample, token, rows, row = find_tile(tl.program_id(0), cu_seqlens, batch, GROUP, BLOCK_R)
    if sample >= 0:
        largest = tl.full((BLOCK_R,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_R,), tl.float32)
        for first_page in range(0, listed, BLOCK_P):
            weight = _bounds(
                query, key_summary, page_table, page_lengths, token, row, rows, head, sample, first_page, listed,
                heads, key_heads, scale, WIDTH, FIRST, LAST, BLOCK_R, BLOCK_P, BLOCK_D,
            )  # fmt: skip
            most = tl.maximum(largest, tl.max(weight, 1))
            shift = tl.where(most == -float("inf"), 0.0, most)
            total = total * tl.exp(largest - shift) + tl.sum(tl.exp(weight - shift[:, None]), 1)
            largest = most
        r = row + tl.arange(0, BLOCK_R)
        # Where a sample has no page, no weight is ever read.
        tl.store(lse + head * tl.cast(tokens, tl.int64) * GROUP + token * GROUP + r, largest + tl.log(total), r < rows)


@triton.jit
def _score(
    query, key_summary, page_table, page_lengths, cu_seqlens, lse, scores, tokens, listed, heads, key_heads, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    share = tl.program_id(1)  # of a sample's row tiles, and which key head
    first_page = tl.program_id(2) * BLOCK_P
    shares = tl.num_programs(1) // key_heads
    head = share % key_heads
    token = tl.load(cu_seqlens + sample)
    rows = (tl.load(cu_seqlens + sample + 1) - token) * GROUP
    score = tl.zeros((BLOCK_P,), tl.float32)
    for row in range((share // key_heads) * BLOCK_R, rows, shares * BLOCK_R):
        weight = _bounds(
            query, key_summary, page_table, page_lengths, token, row, rows, head, sample, first_page, listed,
            heads, key_heads, scale, WIDTH, FIRST, LAST, BLOCK_R, BLOCK_P, BLOCK_D,
        )  # fmt: skip
        r = row + tl.arange(0, BLOCK_R)
        at = head * tl.cast(tokens, tl.int64) * GROUP + token * GROUP + r
        # Rows beyond the last weigh nothing: their softmax is over infinity.
        joint = tl.load(lse + at, mask=r < rows, other=float("inf"))
        share_of_row = tl.exp(weight - joint[:, None])
        score += tl.sum(tl.where(weight == -float("inf"), 0.0, share_of_row), 0)
    w = first_page + tl.arange(0, BLOCK_P)
    to = (sample.to(tl.int64) * tl.num_programs(1) + share) * listed + w
    tl.store(scores + to, score, mask=w < listed)


def retrieve(
    query: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    inv_freq: Tensor,
    key_summary: Tensor,
    page_table: Tensor,
    page_lengths: Tensor,
    budget: int,
    keep: Tensor | None = None,
    mode: str = "both",
) -> Tensor:
    kept = {} if keep is None else {"keep": (keep, "P", BOOL)}
    sizes = check(
        "retrieve",
        query=(query, "M Hq D", ROWS),
        position_ids=(position_ids, "M", INT64),
        inv_freq=(inv_freq, "F", (torch.float32,)),
        key_summary=(key_summary, "P Hkv 3 D", WIDE),
        page_table=(page_table, "B W", INT32),
        page_lengths=(page_lengths, "P", INT32),
        cu_seqlens=(cu_seqlens, "B+1", INT64),
        **kept,
    )
    check_rotation("retrieve", sizes)
    check_groups("retrieve", sizes)
    require(budget >= 1, f"retrieve: budget must be at least 1 page, got {budget}")
    rotated = 2 * sizes["F"]
    dims = {"both": (0, sizes["D"]), "rotated": (0, rotated), "content": (rotated, sizes["D"])}
    require(mode in dims, f'retrieve: mode must be "both", "rotated" or "content", got "{mode}"')
    turned = rope(query, position_ids, inv_freq)
    tensors = [turned, key_summary.contiguous(), page_table.contiguous(), page_lengths.contiguous()]
    scores = _scores(tensors, cu_seqlens.contiguous(), dims[mode])
    return _choose(scores, page_table, page_lengths, min(budget, sizes["W"]), keep)


def _scores(tensors: list[Tensor], cu_seqlens: Tensor, dims: tuple[int, int]) -> Tensor:
    """What each listed page weighs, summed over queries and heads: (B, W) float32."""
    query, key_summary, page_table, _ = tensors
    (tokens, heads, width), key_heads, (batch, listed) = query.shape, key_summary.shape[1], page_table.shape
    group, scale = heads // key_heads, width**-0.5
    block_d = cover(dims[1] - dims[0], 16)
    tile = max(16, min(TILE, TILE_NUMBERS // block_d))
    blocks = tile, tile, block_d
    lse = query.new_empty(key_heads, tokens * group, dtype=torch.float32)
    _normalize[(triton.cdiv(tokens * group, tile) + batch, key_heads)](
        *tensors, cu_seqlens, lse, tokens, listed, heads, key_heads, batch, scale, group, width, *dims, *blocks
    )
    shares = key_heads * max(1, min(8, tokens * group // (8 * tile)))
    scores = query.new_empty(batch, shares, listed, dtype=torch.float32)
    _score[(batch, shares, triton.cdiv(listed, tile))](
        *tensors, cu_seqlens, lse, scores, tokens, listed, heads, key_heads, scale, group, width, *dims, *blocks
    )
    return scores.sum(1)


def _choose(scores: Tensor, page_table: Tensor, page_lengths: Tensor, count: int, keep: Tensor | None) -> Tensor:
    """The best ``count`` pages of each sample, ascending; of equal scores the lower page wins."""
    if not len(page_lengths):
        return page_table.new_full((len(page_table), count), -1)
    listed = page_table.clamp(min=0).long()
    there = (page_table >= 0) & (page_lengths[listed] > 0)
    if keep is not None:
        scores = scores.masked_fill(keep[listed], torch.inf)
    # A NaN has no place in an order: such a page comes last of those that are there.
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).masked_fill(~there, -torch.inf)
    pages, order = page_table.masked_fill(~there, NO_PAGE).sort(dim=1, stable=True)
    best = scores.gather(1, order).sort(dim=1, descending=True, stable=True).indices[:, :count]
    chosen = pages.gather(1, best).sort(dim=1).values
    return chosen.masked_fill(chosen == NO_PAGE, -1)
