# SPDX-License-Identifier: Apache-2.0
"""One memory spread over the ranks of a torch.distributed group: each attends to its own pages, one collective joins.

Queries and everything after the attention are the same on every rank; only the pages differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

import hourllava_ext as ext

from .pages import MemoryPages

PAGES_AT_ONCE = 64  # whose scores of a question's rows exist at a time


@dataclass(frozen=True)
class Shard:
    """Which rank of a group holds which second of a video."""

    group: dist.ProcessGroup
    owner: Tensor  # (T,) int64: the rank of each second

    @property
    def seconds(self) -> Tensor:
        """The seconds that this rank holds, in the order of its frames: int64 (n,)."""
        return self.parts[dist.get_rank(self.group)]

    @property
    def parts(self) -> list[Tensor]:
        """The same of every rank."""
        return [(self.owner == rank).nonzero()[:, 0] for rank in range(dist.get_world_size(self.group))]


def sharded_attention(
    query: Tensor,
    pages: MemoryPages,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    inv_freq: Tensor,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of packed queries to pages that lie on all ranks of a group; differentiable in queries and pages.

    One collective on the way forward, one on the way back, whatever the memory's length. The loss must be the same on
    every rank, as it is when every rank computes it from what this returns.

    Args:
        query: (M, Hq, D), not rotated, the same on every rank.
        pages: this rank's; every sample's row of the table lists the pages that are here, or only -1.
        position_ids: (M,) int64.
        cu_seqlens: (B + 1,) int64.
        inv_freq: (F,) float32.
        group: the ranks; None is the default group.

    Returns:
        out (M, Hq, D) in the dtype of `query`, and lse (Hq, M) float32 (float64 for float64), as `paged_attention`
        gives for all pages in one place.
    """
    out, lse, *_ = ext.paged_attention(
        _Replicated.apply(query, group),
        pages.key_pages,
        pages.value_pages,
        pages.page_table,
        pages.page_lengths,
        position_ids,
        cu_seqlens,
        inv_freq,
    )
    return ext.merge_attention(*_Gathered.apply(out, lse, group))


def gather_pages(pages: MemoryPages, page_lengths: Sequence[Tensor], group: dist.ProcessGroup) -> MemoryPages:
    """Every rank's pages, rank after rank, by their summaries: enough to choose some of them on every rank alike.

    Args:
        pages: this rank's; the first row of the table lists them in order.
        page_lengths: of each rank's pages, (P,) int32.
        group: the ranks.

    Returns:
        Pages whose keys and values are this rank's, and all else is of all ranks.
    """
    own, lengths = pages.key_summary[pages.page_table[0].to(torch.int64)], torch.cat(list(page_lengths))
    padded = own.new_zeros(max(map(len, page_lengths)), *own.shape[1:])
    padded[: len(own)] = own
    everyone = [torch.empty_like(padded) for _ in page_lengths]
    dist.all_gather(everyone, padded, group)
    summary = torch.cat([part[: len(rows)] for part, rows in zip(everyone, page_lengths, strict=True)])
    table = torch.arange(len(lengths), dtype=torch.int32, device=lengths.device)
    return MemoryPages(pages.key_pages, pages.value_pages, summary, lengths, table[None])


def own_pages(chosen: Tensor, pages: MemoryPages, page_lengths: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
    """Of pages (B, W) int32 numbered as `gather_pages` numbers them, those of this rank by its own numbers, else -1."""
    first, count = sum(map(len, page_lengths[: dist.get_rank(group)])), pages.page_table.shape[1]
    own = F.pad(pages.page_table[0], (0, 1), value=-1)  # one hole behind the last, for what lies elsewhere
    number = chosen.to(torch.int64) - first
    return own[torch.where((number >= 0) & (number < count), number, count)]


def page_mass(
    query: Tensor,
    lse: Tensor,
    pages: MemoryPages,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    inv_freq: Tensor,
    weight: Tensor,
) -> Tensor:
    """The mass of `paged_attention` on this rank's pages, of attention whose log-sum-exp spans the pages of all ranks.

    Only the keys are read again, and only by rows that weigh anything: those of a question are few.

    Args:
        query, pages, position_ids, cu_seqlens, inv_freq: as for `sharded_attention`.
        lse: (Hq, M), what it returned.
        weight: (M,) float32, how much each query counts.

    Returns:
        (B, W) in the dtype of `lse`: over all ranks, a sample's shares add up to 1.
    """
    kv_heads, rows, width = pages.key_pages.shape[1:]
    mass = lse.new_zeros(pages.page_table.shape)
    place = torch.arange(rows, device=query.device)
    for sample, (first, end) in enumerate(pairwise(cu_seqlens.tolist())):
        chosen = first + weight[first:end].nonzero()[:, 0]
        turned = ext.rope(query[chosen].contiguous(), position_ids[chosen], inv_freq).to(lse.dtype) * width**-0.5
        turned = turned.unflatten(1, (kv_heads, -1))  # (rows, Hkv, heads of each, D)
        share = weight[chosen].to(lse.dtype) / (weight[first:end].sum() * query.shape[1])
        behind = lse[:, chosen].T.reshape(turned.shape[:-1])[..., None]
        for columns in (pages.page_table[sample] >= 0).nonzero()[:, 0].split(PAGES_AT_ONCE):
            listed = pages.page_table[sample, columns].to(torch.int64)
            scores = torch.einsum("mkgd,pkrd->pmkgr", turned, pages.key_pages[listed].to(lse.dtype)) - behind
            free = place >= pages.page_lengths[listed][:, None, None, None, None]
            mass[sample, columns] = torch.einsum("pmkgr,m->p", scores.masked_fill(free, -torch.inf).exp(), share)
    return mass


def least_loaded(loads: Sequence[int]) -> int:
    """The rank that the next frames belong to: the one that holds the fewest, the lower one of equals."""
    return min(range(len(loads)), key=lambda rank: loads[rank])


class _Replicated(torch.autograd.Function):
    """The same tensor on every rank, whose gradient is the sum over what each rank did with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # A sum of rounded parts would round again for every rank: it is taken in float32.
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype), None


class _Gathered(torch.autograd.Function):
    """Every rank's output (S, M, H, D) and log-sum-exp (S, H, M), in one collective; a rank's gradient is its own."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        ctx.rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        parts = [out.contiguous().view(-1).view(torch.uint8), lse.contiguous().view(-1).view(torch.uint8)]
        mine = torch.cat(parts)
        everyone = [torch.empty_like(mine) for _ in range(ranks)]
        dist.all_gather(everyone, mine, group)
        split = len(parts[0])
        outs = [part[:split].clone().view(out.dtype).view(out.shape) for part in everyone]
        lses = [part[split:].clone().view(lse.dtype).view(lse.shape) for part in everyone]
        return torch.stack(outs), torch.stack(lses)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad_out[ctx.rank], grad_lse[ctx.rank], None
