# SPDX-License-Identifier: Apache-2.0
"""Where a video's keys and values lie: pages of 128 rows, visual tokens and newlines each filling their own."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

PAGE_SIZE = 128


@dataclass(frozen=True)
class MemoryPages:
    """What one MemAug block reads: its keys and values, and the pages that belong to each sample."""

    key_pages: Tensor  # (P, Hkv, 128, D), rotated
    value_pages: Tensor  # (P, Hkv, 128, D)
    key_summary: Tensor  # (P, Hkv, 3, D) float32
    page_lengths: Tensor  # (P,) int32: rows in use
    page_table: Tensor  # (B, pages) int32, -1 where a sample has no more pages


@dataclass(frozen=True)
class PageLayout:
    """Rows of a batch of memories: first every visual token, then every newline, and the slots they are written to."""

    position_ids: Tensor  # (rows,) int64
    slots: Tensor  # (rows,) int64: page * 128 + row in the page
    page_table: Tensor  # (B, pages) int32
    num_pages: int


def page_count(frames: int, per_frame: int) -> int:
    """Pages that a memory of `frames` frames needs, of both kinds."""
    return _ceil_div(frames * per_frame, PAGE_SIZE) + _ceil_div(frames, PAGE_SIZE)


def visual_slots(frame: Tensor, per_frame: int) -> Tensor:
    """Slots (n, per_frame) of the visual tokens of frames number `frame` (n,) of one memory.

    A page is numbered when the first frame that needs it arrives, so a frame's slots never depend on later frames.
    """
    row = frame[:, None] * per_frame + torch.arange(per_frame, device=frame.device)
    page = row // PAGE_SIZE
    newline_pages_before = _ceil_div(page * PAGE_SIZE // per_frame, PAGE_SIZE)
    return (page + newline_pages_before) * PAGE_SIZE + row % PAGE_SIZE


def newline_slots(frame: Tensor, per_frame: int) -> Tensor:
    """Slots (n,) of the newline tokens of frames number `frame` (n,) of one memory."""
    page = frame // PAGE_SIZE
    # The frame that opens a newline page has its visual tokens placed first.
    visual_pages_before = _ceil_div((page * PAGE_SIZE + 1) * per_frame, PAGE_SIZE)
    return (page + visual_pages_before) * PAGE_SIZE + frame % PAGE_SIZE


def frame_slots(frame: Tensor, per_frame: int) -> tuple[Tensor, Tensor]:
    """Slots and position ids, each int64 (n * (N + 1),): the frames' visual tokens in order, then their newlines."""
    slots = torch.cat([visual_slots(frame, per_frame).flatten(), newline_slots(frame, per_frame)])
    first = frame * (per_frame + 1)
    visual = first[:, None] + torch.arange(per_frame, device=frame.device)
    return slots, torch.cat([visual.flatten(), first + per_frame])


def rows_in_use(frames: int, per_frame: int, device: torch.device) -> Tensor:
    """Rows in use (P,) int32 of every page of a memory of `frames` frames: all are full but the last of each kind."""
    lengths = torch.full((page_count(frames, per_frame),), PAGE_SIZE, dtype=torch.int32, device=device)
    if frames:
        last = torch.tensor([frames - 1], device=device)
        for slots in (visual_slots(last, per_frame)[:, -1], newline_slots(last, per_frame)):
            lengths[slots // PAGE_SIZE] = (slots % PAGE_SIZE + 1).to(torch.int32)
    return lengths


def batch_layout(frames: list[int], per_frame: int, device: torch.device) -> PageLayout:
    """Lay out the memories of a batch, `frames[b]` frames each, one after the other in one pool of pages."""
    needed = [page_count(n, per_frame) for n in frames]
    count, pages = torch.tensor([frames, needed], device=device)
    first_page = pages.cumsum(0) - pages
    sample = torch.arange(len(frames), device=device).repeat_interleave(count, output_size=sum(frames))
    frame = torch.arange(sum(frames), device=device) - (count.cumsum(0) - count)[sample]
    slots, position_ids = frame_slots(frame, per_frame)
    owner = torch.cat([sample.repeat_interleave(per_frame), sample])
    column = torch.arange(max(needed), device=device)
    page_table = torch.where(column < pages[:, None], first_page[:, None] + column, -1).to(torch.int32)
    return PageLayout(position_ids, slots + first_page[owner] * PAGE_SIZE, page_table, sum(needed))


Whole = TypeVar("Whole", int, Tensor)


def _ceil_div(x: Whole, divisor: int) -> Whole:
    return (x + divisor - 1) // divisor
