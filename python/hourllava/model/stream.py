# SPDX-License-Identifier: Apache-2.0
"""Interleaving text and visual tokens of a batch without a loop: for MemAug's queries and for the decoder's input."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interleaved:
    """Rows of B sequences end to end, as indices into [every text token of the batch; every visual token]."""

    order: Tensor  # (M,) int64: text token b * L + l, or B * L + visual token
    sample: Tensor  # (M,) int64: the sequence each row belongs to
    visual: Tensor  # (M,) bool
    rank: Tensor  # (M,) int64: place of the row in its sequence
    visual_rank: Tensor  # (M,) int64: place among the sequence's visual tokens, for visual rows
    lengths: list[int]  # rows of each sequence


@dataclass(frozen=True)
class QueryStream:
    """What MemAug needs to know about its packed queries besides their values."""

    position_ids: Tensor  # (M,) int64
    cu_seqlens: Tensor  # (B + 1,) int64
    lengths: list[int]  # rows of each sample


def interleave(is_image: Tensor, keep: Tensor, visual_lengths: list[int]) -> Interleaved:
    """Put `visual_lengths[b]` visual tokens where `is_image` (B, L) stands, between the text to `keep` (B, L)."""
    batch, length = keep.shape
    device = keep.device
    visual_count = torch.tensor(visual_lengths, device=device)
    count = torch.where(is_image, visual_count[:, None], keep.to(torch.int64))
    lengths = count.sum(1)
    total = lengths.tolist()
    flat = count.flatten()
    token = torch.arange(batch * length, device=device).repeat_interleave(flat, output_size=sum(total))
    row = torch.arange(sum(total), device=device)
    sample = token // length
    visual = is_image.flatten()[token]
    visual_rank = row - (flat.cumsum(0) - flat)[token]
    visual_start = visual_count.cumsum(0) - visual_count
    order = torch.where(visual, batch * length + visual_start[sample] + visual_rank, token)
    rank = row - (lengths.cumsum(0) - lengths)[sample]
    return Interleaved(order, sample, visual, rank, visual_rank, total)


def query_stream(
    is_image: Tensor, keep: Tensor, kept_positions: Tensor, visual_lengths: list[int], spans: list[int]
) -> tuple[Interleaved, QueryStream]:
    """MemAug's query stream of a batch (SPEC A.4): kept text, with the kept visual tokens at the video's place.

    Args:
        is_image: (B, L) bool, where the video goes; one place a sample.
        keep: (B, L) bool, text tokens that join the stream.
        kept_positions: (V,) int64, position ids of all kept visual tokens in their own memories.
        visual_lengths: kept visual tokens of each sample, summing to V.
        spans: positions that each memory spans, 65 T: text behind the video goes on from there.

    Returns:
        the interleaving, and the stream's positions and bounds. Visual ids are shifted by the text before them
        although the memory's own ids are not: released checkpoints were trained so.
    """
    rows = interleave(is_image, keep, visual_lengths)
    device = keep.device
    before = (keep & (is_image.cumsum(1) == 0)).sum(1)[rows.sample]
    visual_count = torch.tensor(visual_lengths, device=device)[rows.sample]
    span = torch.tensor(spans, device=device)[rows.sample]
    text = torch.where(rows.rank < before, rows.rank, rows.rank - visual_count + span)
    visual_token = (rows.order - keep.numel()).clamp(min=0)
    position_ids = torch.where(rows.visual, before + kept_positions[visual_token], text)
    bounds = torch.tensor([0, *rows.lengths], device=device).cumsum(0)
    return rows, QueryStream(position_ids, bounds, rows.lengths)


def pad_rows(x: Tensor, rows: Interleaved, fill: float, left: bool = False) -> Tensor:
    """Packed rows (M, ...) as a padded batch (B, longest, ...)."""
    longest = max(rows.lengths)
    column = rows.rank
    if left:
        column = column + (longest - torch.tensor(rows.lengths, device=x.device))[rows.sample]
    padded = x.new_full((len(rows.lengths) * longest, *x.shape[1:]), fill)
    padded = padded.index_copy(0, rows.sample * longest + column, x)
    return padded.view(len(rows.lengths), longest, *x.shape[1:])
