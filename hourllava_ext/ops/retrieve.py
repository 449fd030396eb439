# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from hourllava_ext.library import register_fake


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
    """A shorter page table: for each sample, the pages that its queries are likely to attend to.

    A page's weight for a query is the softmax, over the sample's pages, of the largest score that any key between the
    page's minima and maxima could have, plus the logarithm of the page's length. Weights are added up over queries and
    heads and the best pages stay. Empty pages never do; of equal pages the lower one wins. Not differentiable.

    Args:
        query: Queries of all samples, one sample after the other, not yet rotated. (M, Hq, D) float32, float16,
            bfloat16 or float64
        position_ids: Place of each query in the memory. (M,) int64
        cu_seqlens: Sample ``b`` owns the queries ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. (B + 1,) int64
        inv_freq: Radians per position of the first 2F dims of a head. (F,) float32, 2F <= D
        key_summary: Mean, minimum and maximum key of each page. (P, Hkv, 3, D) float32 (float64 for float64), Hq a
            multiple of Hkv
        page_table: Pages of each sample, -1 for a hole anywhere. (B, W) int32
        page_lengths: Filled rows of each page. (P,) int32
        budget: Most pages to keep for a sample, at least 1.
        keep: Pages that stay whatever their score, as far as the budget goes. (P,) bool
        mode: Dims that count: "rotated" (the first 2F, which know positions), "content" (the others) or "both".

    Returns:
        Pages in ascending order, then -1. (B, min(budget, W)) int32

    Raises:
        RuntimeError: A shape or dtype differs from the above, ``mode`` is unknown, or on the CPU a page id, page length
            or ``cu_seqlens`` is out of range.

    Source: the bound is that of Quest, https://arxiv.org/abs/2406.10774.
    """
    return torch.ops.hourllava_ext.retrieve(
        query, position_ids, cu_seqlens, inv_freq, key_summary, page_table, page_lengths, budget, keep, mode
    )


@register_fake("retrieve")
def _fake(query, position_ids, cu_seqlens, inv_freq, key_summary, page_table, _, budget, *options):  # type: ignore[no-untyped-def]
    batch, listed = page_table.shape
    return page_table.new_empty((batch, torch.sym_min(budget, listed)))
