# SPDX-License-Identifier: Apache-2.0
"""Packed rows of a group against the pages of their sample, ascending, so that the order of a table changes nothing.

Queries are rotated in the prologue. Where the row tiles alone would leave the device idle, each sample's pages are
split and the parts merged.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hourllava_ext.triton.arguments import INT32, INT64, ROWS, WIDE, check, check_groups, check_rotation, require
from hourllava_ext.triton.common import cover, find_tile, partner, processors, rotation, turn
from hourllava_ext.triton.merge_attention import merge_attention
from hourllava_ext.triton.rope import rope

MOST_DIMS = 256
LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Shape:
    """Sizes of a call, and the blocks that its kernels work in."""

    tokens: int
    query_heads: int
    key_heads: int
    width: int
    pages: int
    page_size: int
    batch: int
    listed: int
    frequencies: int
    element_size: int  # bytes of a stored value

    @property
    def group(self) -> int:
        return self.query_heads // self.key_heads

    @property
    def block_d(self) -> int:
        return cover(self.width, 16)

    def rows_in(self, size: int) -> int:
        """How many rows of a head fit into so many bytes of shared memory, 16 to 128."""
        return max(16, min(128, size // (self.block_d * self.element_size)))

    @property
    def block_n(self) -> int:
        """Keys at a time: half a page of 128 rows in the 3B model, so that every GPU has the shared memory, where the
        weights of a tile may lie beside its queries, keys and values.
        """
        return min(self.rows_in(16384), 256 // self.element_size, cover(self.page_size, 16))

    @property
    def block_m(self) -> int:
        """Query rows at a time."""
        return min(self.rows_in(32768), cover(self.tokens * self.group, 16))

    def tiles(self, rows: int) -> int:
        """Row tiles of all samples, at most: the host does not know their lengths."""
        return triton.cdiv(self.tokens * self.group, rows) + self.batch


@triton.jit
def query_rows(token, row, rows, head, query_heads, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Tokens and query heads of a tile of packed rows (BLOCK_M,), and whether they exist."""
    r = row + tl.arange(0, BLOCK_M)
    return token + r // GROUP, head * GROUP + r % GROUP, r < rows


@triton.jit
def page_part(page_table, page_lengths, row_of_table, step, head, key_heads, page_size, WIDTH: tl.constexpr,
              BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Keys of one step through a table: their offsets in a pool (BLOCK_N, BLOCK_D), which exist, which to load."""
    parts = (page_size + BLOCK_N - 1) // BLOCK_N
    page = tl.load(page_table + row_of_table + step // parts).to(tl.int64)
    length = tl.load(page_lengths + page)
    key = (step % parts) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    offsets = (((page * key_heads + head) * page_size + key) * WIDTH)[:, None] + d[None, :]
    return offsets, key < length, (key < length)[:, None] & (d < WIDTH)[None, :]


@triton.jit
def _attend(
    query, key_pages, value_pages, page_table, page_lengths, first_page, position_ids, cu_seqlens, inv_freq, out, lse,
    scale, tokens, batch, listed, page_size, query_heads, key_heads,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, FREQUENCIES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    split = tl.program_id(2).to(tl.int64)
    sample, first_token, rows, row = find_tile(tl.program_id(0), cu_seqlens, batch, GROUP, BLOCK_M)
    if sample >= 0:
        token, query_head, exists = query_rows(first_token, row, rows, head, query_heads, GROUP, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        inside = exists[:, None] & (d < WIDTH)[None, :]
        at = ((token * query_heads + query_head) * WIDTH)[:, None]
        position = tl.load(position_ids + token, mask=exists, other=0)
        cosine, sine = rotation(position, d, inv_freq, FREQUENCIES, query.dtype.element_ty)
        own = tl.load(query + at + d[None, :], mask=inside, other=0.0)
        other = tl.load(query + at + partner(d, FREQUENCIES)[None, :], mask=inside, other=0.0)
        q = turn(own, other, cosine, sine, d, FREQUENCIES).to(query.dtype.element_ty)

        largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        parts = (page_size + BLOCK_N - 1) // BLOCK_N
        row_of_table = sample.to(tl.int64) * listed
        hole = tl.load(first_page + sample)
        per_split = (listed - hole + tl.num_programs(2) - 1) // tl.num_programs(2)
        begin = hole + split * per_split
        end = tl.minimum(begin + per_split, listed)
        for step in range(begin * parts, end * parts):
            offsets, valid, there = page_part(
                page_table, page_lengths, row_of_table, step, head, key_heads, page_size, WIDTH, BLOCK_N, BLOCK_D
            )
            k = tl.load(key_pages + offsets, mask=there, other=0.0)
            # In natural units, so that the log-sum-exp takes no rounding from a change of base.
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where(valid[None, :], scores, -float("inf"))
            most = tl.maximum(largest, tl.max(scores, 1))
            shift = tl.where(most == -float("inf"), 0.0, most)
            p = tl.exp2((scores - shift[:, None]) * LOG2E)
            kept = tl.exp2((largest - shift) * LOG2E)
            total = total * kept + tl.sum(p, 1)
            v = tl.load(value_pages + offsets, mask=there, other=0.0)
            sums = tl.dot(p.to(v.dtype), v, sums * kept[:, None], input_precision="ieee")
            largest = most
        nobody = total == 0
        part_out = out + split * tokens * query_heads * WIDTH
        mean = tl.div_rn(sums, tl.where(nobody, 1.0, total)[:, None])
        tl.store(part_out + at + d[None, :], mean.to(out.dtype.element_ty), mask=inside)
        joint = largest + tl.log(tl.where(nobody, 1.0, total))
        part_lse = lse + split * query_heads * tokens
        tl.store(part_lse + query_head.to(tl.int64) * tokens + token, joint, mask=exists)


@triton.jit
def _mass(
    turned, key_pages, page_table, page_lengths, cu_seqlens, lse, mass_weight, mass, scale,
    tokens, listed, page_size, query_heads, key_heads,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0)  # of the table
    head = tl.program_id(1)
    sample = entry // listed
    place = entry % listed
    row_of_table = sample.to(tl.int64) * listed
    first_token = tl.load(cu_seqlens + sample)
    rows = (tl.load(cu_seqlens + sample + 1) - first_token) * GROUP
    total = tl.zeros((BLOCK_M,), tl.float32)
    weights = tl.zeros((BLOCK_M,), tl.float32)
    parts = (page_size + BLOCK_N - 1) // BLOCK_N
    d = tl.arange(0, BLOCK_D)
    if tl.load(page_table + entry) >= 0:
        for row in range(0, rows, BLOCK_M):
            token, query_head, exists = query_rows(first_token, row, rows, head, query_heads, GROUP, BLOCK_M)
            weight = tl.load(mass_weight + token, mask=exists, other=0.0)
            weights += weight
            # Only the rows of a question have a weight, a tile or two of many: the keys are not read for the others.
            if tl.max(tl.abs(weight), 0) > 0:
                at = ((token * query_heads + query_head) * WIDTH)[:, None] + d[None, :]
                q = tl.load(turned + at, mask=exists[:, None] & (d < WIDTH)[None, :], other=0.0)
                joint = tl.load(lse + query_head.to(tl.int64) * tokens + token, mask=exists, other=0.0)
                for part in range(parts):
                    offsets, valid, there = page_part(
                        page_table, page_lengths, row_of_table, place * parts + part, head, key_heads, page_size,
                        WIDTH, BLOCK_N, BLOCK_D,
                    )  # fmt: skip
                    k = tl.load(key_pages + offsets, mask=there, other=0.0)
                    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
                    p = tl.where(valid[None, :], tl.exp2((scores - joint[:, None]) * LOG2E), 0.0)
                    total += weight * tl.sum(p, 1)
    # The weights of tokens were counted once for each head of the group, and so were the shares.
    divisor = tl.sum(weights, 0) * key_heads
    share = tl.where(divisor == 0, 0.0, tl.div_rn(tl.sum(total, 0), tl.where(divisor == 0, 1.0, divisor)))
    tl.store(mass + entry.to(tl.int64) * key_heads + head, share)


def checked(op: str, tensors: list[Tensor], **more: tuple[Tensor, str, tuple[torch.dtype, ...]]) -> Shape:
    """The sizes of a call; ``tensors`` are the first eight arguments of ``paged_attention``."""
    query, key_pages, value_pages, page_table, page_lengths, position_ids, cu_seqlens, inv_freq = tensors
    sizes = check(
        op,
        query=(query, "M Hq D", ROWS),
        key_pages=(key_pages, "P Hkv S D", ROWS),
        value_pages=(value_pages, "P Hkv S D", ROWS),
        page_table=(page_table, "B W", INT32),
        page_lengths=(page_lengths, "P", INT32),
        position_ids=(position_ids, "M", INT64),
        cu_seqlens=(cu_seqlens, "B+1", INT64),
        inv_freq=(inv_freq, "F", (torch.float32,)),
        **more,
    )
    check_rotation(op, sizes)
    check_groups(op, sizes)
    width = sizes["D"]
    require(
        width % 8 == 0 and 0 < width <= MOST_DIMS,
        f"{op}: the head size must be a multiple of 8 up to {MOST_DIMS}, got {width}; pad the heads with zeros",
    )
    names = ("M", "Hq", "Hkv", "D", "P", "S", "B", "W", "F")
    return Shape(*[sizes[name] for name in names] + [query.element_size()])


def splits_of(shape: Shape, device: torch.device) -> int:
    """Into how many parts a sample's pages are split: enough to keep the device busy, at least 8 pages each."""
    programs = max(1, shape.tiles(shape.block_m) * shape.key_heads)
    return max(1, min(2 * processors(device) // programs, shape.listed // 8))


def paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    page_lengths: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    inv_freq: Tensor,
    scale: float,
    mass_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = [query, key_pages, value_pages, page_table, page_lengths, position_ids, cu_seqlens, inv_freq]
    weighed = {} if mass_weight is None else {"mass_weight": (mass_weight, "M", WIDE)}
    shape = checked("paged_attention", tensors, **weighed)
    query, key_pages, value_pages, page_table, page_lengths, position_ids, cu_seqlens, inv_freq = (
        t.contiguous() for t in tensors
    )
    ascending, order = page_table.sort(dim=1)
    first_page = (page_table < 0).sum(1, dtype=torch.int32)
    splits = splits_of(shape, query.device)
    # Parts are merged in float32 and rounded once.
    outs = query.new_empty(splits, *query.shape, dtype=query.dtype if splits == 1 else torch.float32)
    lses = query.new_empty(splits, shape.query_heads, shape.tokens, dtype=torch.float32)
    sizes = shape.page_size, shape.query_heads, shape.key_heads
    _attend[(shape.tiles(shape.block_m), shape.key_heads, splits)](
        query, key_pages, value_pages, ascending, page_lengths, first_page, position_ids, cu_seqlens, inv_freq,
        outs, lses, scale, shape.tokens, shape.batch, shape.listed, *sizes,
        shape.group, shape.width, shape.frequencies, shape.block_m, shape.block_n, shape.block_d,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    out, lse = (outs[0], lses[0]) if splits == 1 else merge_attention(outs, lses)
    out = out.to(query.dtype)
    if mass_weight is None:
        return out, lse, lse.new_empty(0, shape.listed)
    shares = lse.new_empty(shape.batch, shape.listed, shape.key_heads)
    block_m = min(64, shape.block_m)
    _mass[(shape.batch * shape.listed, shape.key_heads)](
        rope(query, position_ids, inv_freq), key_pages, ascending, page_lengths, cu_seqlens, lse,
        mass_weight.contiguous(), shares, scale, shape.tokens, shape.listed, *sizes,
        shape.group, shape.width, block_m, shape.block_n, shape.block_d, num_warps=4, num_stages=2,
    )  # fmt: skip
    mass = shares.sum(2)
    return out, lse, torch.empty_like(mass).scatter_(1, order, mass)
