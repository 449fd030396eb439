# SPDX-License-Identifier: Apache-2.0
"""One place where pages of memories lie: allocated once, in full, on one device."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import BinaryIO

import torch
from torch import Tensor

from hourllava.errors import AdmissionError, MemoryFileError
from hourllava_ext.page_allocator import PageAllocator

from .pages import PAGE_SIZE, MemoryPages, open_pages, rows_in_use
from .pool import PIECE_BYTES
from .sizes import format_size
from .storage import as_bytes
from .video_memory import summary_of
from .writer import SUMMARY_ROWS, MemoryShape, summary_dtype


class PageTier:
    """Pages of all blocks within a budget, and who holds them.

    Args:
        name: what people call the place.
        shape: sizes of the memories.
        device: where the pages lie.
        budget: bytes that they may take, to the last one.
        pinned: lock them in the host's RAM, so that a GPU copies them at full speed.

    Raises:
        AdmissionError: the budget is smaller than a page, or the device has not so much.
    """

    def __init__(self, name: str, shape: MemoryShape, device: torch.device, budget: int, pinned: bool = False) -> None:
        pages = budget // shape.page_bytes
        what = f"budget of {format_size(budget)} on {name}"
        if not pages:
            raise AdmissionError(what, f"a page takes {format_size(shape.page_bytes)}", "give more")

        def slab(*row: int, dtype: torch.dtype = shape.dtype) -> Tensor:
            return torch.empty(pages, *row, dtype=dtype, device=device, pin_memory=pinned)

        blocks, page = range(shape.blocks), (shape.kv_heads, PAGE_SIZE, shape.head_dim)
        summary = (shape.kv_heads, SUMMARY_ROWS, shape.head_dim)
        try:
            self.keys = [slab(*page) for _ in blocks]
            self.values = [slab(*page) for _ in blocks]
            self.summaries = [slab(*summary, dtype=summary_dtype(shape.dtype)) for _ in blocks]
            self.lengths = torch.zeros(pages, dtype=torch.int32, device=device, pin_memory=pinned)
            self.allocator = PageAllocator(pages)
        except RuntimeError as error:
            why = f"it cannot be allocated ({str(error).partition(chr(10))[0]})"
            raise AdmissionError(what, why, "give less, or free some of the device") from error
        self.name, self.shape, self.budget, self.pages = name, shape, budget, pages

    def of_memory(self, table: Tensor) -> list[MemoryPages]:
        """What each block reads of a memory whose pages are `table`, int64 (n,)."""
        listed = table.to(self.lengths.device, torch.int32)[None]
        slabs = zip(self.keys, self.values, self.summaries, strict=True)
        return [MemoryPages(k, v, s, self.lengths, listed) for k, v, s in slabs]

    def copy(self, pages: Tensor, source: "PageTier", source_pages: Tensor) -> None:
        """Fill `pages` (n,) with those of another tier, wherever both lie."""
        for to, of in _runs(pages, source_pages):
            for ours, theirs in zip(self._slabs(), source._slabs(), strict=True):
                ours[to].copy_(theirs[of])

    def read(self, pages: Tensor, files: Callable[[str], BinaryIO], numbers: Tensor, frames: int) -> None:
        """Fill `pages` (n,) with those that stand at `numbers` (n,) in the files of a memory of `frames` frames.

        Raises:
            MemoryFileError: a file is missing or short.
        """
        names = {"key_pages": self.keys, "value_pages": self.values, "key_summary": self.summaries}
        for name, slabs in names.items():
            for block, slab in enumerate(slabs):
                with files(f"blocks.{block}.{name}") as file:
                    for to, of in _runs(pages, numbers):
                        _read_rows(file, of.start, slab[to])
        lengths = rows_in_use(frames, self.shape.per_frame, torch.device("cpu"))
        self.lengths[pages.to(self.lengths.device)] = lengths[numbers].to(self.lengths.device)
        # Whoever appends may have written behind the rows in use, and the summaries in the files count that.
        for number in open_pages(frames, self.shape.per_frame):
            for page in pages[numbers == number].tolist():
                for keys, summaries in zip(self.keys, self.summaries, strict=True):
                    summaries[page] = summary_of(keys[page], int(lengths[number]))

    def _slabs(self) -> list[Tensor]:
        return [*self.keys, *self.values, *self.summaries, self.lengths]


def _runs(pages: Tensor, others: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut two lists of pages (n,) at once into stretches of neighbours in both."""
    breaks = ((pages.diff() != 1) | (others.diff() != 1)).nonzero()[:, 0] + 1
    for first, end in pairwise([0, *breaks.tolist(), len(pages)]):
        if end > first:
            page, other = int(pages[first]), int(others[first])
            yield slice(page, page + end - first), slice(other, other + end - first)


def _read_rows(file: BinaryIO, first: int, rows: Tensor) -> None:
    """Fill rows (n, ...) of any device with those that stand in a file from row `first` on."""
    row_bytes = rows[:1].nbytes
    file.seek(first * row_bytes)
    for piece in rows.split(max(1, PIECE_BYTES // row_bytes)):
        on_host = piece.device.type == "cpu"
        landing = piece if on_host else torch.empty_like(piece, device="cpu", pin_memory=True)
        if file.readinto(as_bytes(landing)) != landing.nbytes:  # type: ignore[attr-defined]
            raise MemoryFileError(file.name, "it is shorter than it should be", "run `hourllava memory repair`")
        if not on_host:
            piece.copy_(landing)
