# SPDX-License-Identifier: Apache-2.0
"""Where a video's keys and values lie: pages of 128 rows, visual tokens and newlines each filling their own."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
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

    def to(self, device: torch.device) -> "MemoryPages":
        """The same on another device."""
        return MemoryPages(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class PageLayout:
    """Where the rows of a batch of memories are written to, memory after memory."""

    position_ids: Tensor  # (rows,) int64
    slots: Tensor  # (rows,) int64: page * 128 + row in the page
    page_table: Tensor  # (B, pages) int32
    num_pages: int


def page_count(frames: int, per_frame: int) -> int:
    """Pages that a memory of `frames` frames needs, of both kinds."""
    return _ceil_div(frames * per_frame, PAGE_SIZE) + _ceil_div(frames, PAGE_SIZE)


def batches(first: int, end: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Cut frames `first` to `end` at multiples of `size`: start, end and place in the batch of each part."""
    while first < end:
        stop = min(end, first - first % size + size)
        yield first, stop, first % size
        first = stop


def visual_slots(frame: Tensor, per_frame: int) -> Tensor:
    """Slots (n, per_frame) of the visual tokens of frames number `frame` (n,) of one memory.

    A page is numbered when the first frame that needs it arrives, so a frame's slots never depend on later frames.
    """
    row = frame[:, None] * per_frame + torch.arange(per_frame, device=frame.device)
    return _visual_page(row // PAGE_SIZE, per_frame) * PAGE_SIZE + row % PAGE_SIZE


def visual_pages(frames: int, per_frame: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pages (V,) int64 that the visual tokens of so many frames fill one after the other, and the rows (V,) int64
    in use of each."""
    rows = frames * per_frame
    page = torch.arange(_ceil_div(rows, PAGE_SIZE), device=device)
    return _visual_page(page, per_frame), (rows - page * PAGE_SIZE).clamp(max=PAGE_SIZE)


def _visual_page(number: Tensor, per_frame: int) -> Tensor:
    """The page that the visual tokens fill as their `number`th: newline pages opened before it count, too."""
    return number + _ceil_div(number * PAGE_SIZE // per_frame, PAGE_SIZE)


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


def rows_in_use(frames: int, per_frame: int, device: torch.device, first: int = 0) -> Tensor:
    """Rows in use (P - first,) int32 of the pages from `first` on of a memory of `frames` frames: all are full but the
    last of each kind."""
    lengths = torch.full((page_count(frames, per_frame) - first,), PAGE_SIZE, dtype=torch.int32, device=device)
    for page, rows in zip(open_pages(frames, per_frame), (frames * per_frame, frames), strict=False):
        if page >= first:
            lengths[page - first] = (rows - 1) % PAGE_SIZE + 1
    return lengths


def open_pages(frames: int, per_frame: int) -> list[int]:
    """The pages that the next frame may still write to: the last one of each kind."""
    if not frames:
        return []
    last = torch.tensor([frames - 1])
    return [int(slots) // PAGE_SIZE for slots in (visual_slots(last, per_frame)[0, -1], newline_slots(last, per_frame))]


def video_layout(frames: int, per_frame: int, device: torch.device) -> PageLayout:
    """One video's memory: rows are the visual tokens of all frames in order, then their newlines."""
    slots, position_ids = frame_slots(torch.arange(frames, device=device), per_frame)
    return _single(position_ids, slots, page_count(frames, per_frame))


def row_layout(position_ids: Tensor) -> PageLayout:
    """One memory whose rows, with these ids (rows,), fill pages in order: that of images."""
    slots = torch.arange(len(position_ids), device=position_ids.device)
    return _single(position_ids, slots, _ceil_div(len(position_ids), PAGE_SIZE))


def join_layouts(layouts: list[PageLayout | None], device: torch.device) -> PageLayout:
    """The memories of a batch, one after the other in one pool of pages; None for a sample without any."""
    given = [layout for layout in layouts if layout is not None]
    if not given:  # a pool of one page that no sample lists
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return PageLayout(nothing, nothing, torch.full((len(layouts), 1), -1, dtype=torch.int32, device=device), 1)
    pages = torch.tensor([layout.num_pages if layout else 0 for layout in layouts], device=device)
    first_page = pages.cumsum(0) - pages
    column = torch.arange(max(layout.num_pages for layout in given), device=device)
    page_table = torch.where(column < pages[:, None], first_page[:, None] + column, -1).to(torch.int32)
    firsts = [first for first, layout in zip(first_page, layouts, strict=True) if layout is not None]
    slots = [layout.slots + first * PAGE_SIZE for first, layout in zip(firsts, given, strict=True)]
    position_ids = torch.cat([layout.position_ids for layout in given])
    return PageLayout(position_ids, torch.cat(slots), page_table, sum(layout.num_pages for layout in given))


def _single(position_ids: Tensor, slots: Tensor, pages: int) -> PageLayout:
    table = torch.arange(pages, dtype=torch.int32, device=slots.device)[None]
    return PageLayout(position_ids, slots, table, pages)


Whole = TypeVar("Whole", int, Tensor)


def _ceil_div(x: Whole, divisor: int) -> Whole:
    return (x + divisor - 1) // divisor
