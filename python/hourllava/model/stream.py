# SPDX-License-Identifier: Apache-2.0
"""Interleaving text and visual tokens of a batch without a loop: for MemAug's queries and for the decoder's input."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interleaved:
    """Rows of B sequences end to end, as indices into [every text token of the batch; every visual token]."""

    order: Tensor  # (M,) int64: text token b * L + l, or B * L + visual token
    token: Tensor  # (M,) int64: text token, or for visual rows the <image> mark, b * L + l
    sample: Tensor  # (M,) int64: the sequence each row belongs to
    visual: Tensor  # (M,) bool
    rank: Tensor  # (M,) int64: place of the row in its sequence
    lengths: list[int]  # rows of each sequence


@dataclass(frozen=True)
class QueryStream:
    """What MemAug needs to know about its packed queries besides their values."""

    position_ids: Tensor  # (M,) int64
    cu_seqlens: Tensor  # (B + 1,) int64
    lengths: list[int]  # rows of each sample


def interleave(is_image: Tensor, keep: Tensor, visual_lengths: list[int]) -> Interleaved:
    """Put visual tokens at the marks and keep some of the text.

    Args:
        is_image: (B, L) bool, the marks, any number a sample.
        keep: (B, L) bool, text that stays.
        visual_lengths: visual tokens of each mark, in reading order over the batch.
    """
    batch, length = keep.shape
    device = keep.device
    visual_count = torch.tensor(visual_lengths, dtype=torch.int64, device=device)
    count = keep.to(torch.int64).masked_scatter(is_image, visual_count)
    lengths = count.sum(1)
    total = lengths.tolist()
    flat = count.flatten()
    token = torch.arange(batch * length, device=device).repeat_interleave(flat, output_size=sum(total))
    row = torch.arange(sum(total), device=device)
    sample = token // length
    visual = is_image.flatten()[token]
    shown = flat.masked_fill(~is_image.flatten(), 0)
    in_mark = row - (flat.cumsum(0) - flat)[token]
    order = torch.where(visual, batch * length + (shown.cumsum(0) - shown)[token] + in_mark, token)
    rank = row - (lengths.cumsum(0) - lengths)[sample]
    return Interleaved(order, token, sample, visual, rank, total)


def query_stream(
    is_image: Tensor, keep: Tensor, kept_positions: Tensor, visual_lengths: list[int], spans: list[int]
) -> tuple[Interleaved, QueryStream]:
    """MemAug's query stream of a batch: kept text, with the kept visual tokens at their marks.

    Args:
        is_image: (B, L) bool, the marks; a sample without any has no stream.
        keep: (B, L) bool, text tokens that join the stream.
        kept_positions: (V,) int64, position ids of all kept visual tokens in their own memories.
        visual_lengths: kept visual tokens of each mark, summing to V.
        spans: positions that each mark takes up, 65 T for a video: what stands behind it goes on from there.

    Returns:
        the interleaving, and the stream's positions and bounds. Visual ids are shifted by what stands before them
        although the memory's own ids are not: released checkpoints were trained so.
    """
    rows = interleave(is_image, keep & is_image.any(1, keepdim=True), visual_lengths)
    device = keep.device
    span = keep.to(torch.int64).masked_scatter(is_image, torch.tensor(spans, dtype=torch.int64, device=device))
    position_ids = (span.cumsum(1) - span).flatten()[rows.token]
    shift = torch.cat([kept_positions.new_zeros(keep.numel()), kept_positions])[rows.order]
    bounds = torch.tensor([0, *rows.lengths], device=device).cumsum(0)
    return rows, QueryStream(position_ids + shift, bounds, rows.lengths)


def pad_rows(x: Tensor, rows: Interleaved, fill: float, left: bool = False) -> Tensor:
    """Packed rows (M, ...) as a padded batch (B, longest, ...)."""
    longest = max(rows.lengths)
    column = rows.rank
    if left:
        column = column + (longest - torch.tensor(rows.lengths, device=x.device))[rows.sample]
    padded = x.new_full((len(rows.lengths) * longest, *x.shape[1:]), fill)
    padded = padded.index_copy(0, rows.sample * longest + column, x)
    return padded.view(len(rows.lengths), longest, *x.shape[1:])


def left_padding(rows: Interleaved) -> tuple[Tensor, Tensor]:
    """The decoder's attention mask and position ids (B, longest) of rows padded at the left."""
    mask = pad_rows(torch.ones_like(rows.order), rows, 0, left=True)
    return mask, pad_rows(rows.rank, rows, 0, left=True)
