# SPDX-License-Identifier: Apache-2.0
"""Rows that grow in number: in RAM or on a GPU, or in a mapped file whose bytes need not stay in RAM."""

import mmap
import os
from collections.abc import Iterator
from typing import BinaryIO

import torch
from torch import Tensor

from hourllava.errors import MemoryFileError

PIECE_BYTES = 8 << 20  # read or released at once


class Pool:
    """A tensor that grows along its first dim.

    Args:
        row: shape of a row.
        dtype, device: of all rows.
        file: where the rows live, an open file of the caller's (CPU only); None keeps them in memory.

    Attributes:
        rows: (capacity, *row). A tensor taken before `reserve` stays valid; in a file it goes on showing the same
            bytes, in memory it is a copy from then on.
    """

    def __init__(
        self, row: tuple[int, ...], dtype: torch.dtype, device: torch.device, file: BinaryIO | None = None
    ) -> None:
        self.rows = torch.empty(0, *row, dtype=dtype, device=device)
        self._file = file
        self._mapping: mmap.mmap | None = None
        self._row_bytes = torch.empty(row, dtype=dtype, device="meta").nbytes

    @classmethod
    def of(cls, rows: Tensor) -> "Pool":
        """A pool in memory that holds these rows already."""
        pool = cls(tuple(rows.shape[1:]), rows.dtype, rows.device)
        pool.rows = rows
        return pool

    def reserve(self, capacity: int) -> None:
        """Make room for so many rows.

        Raises:
            MemoryFileError: the disk has no room for them.
        """
        if capacity <= len(self.rows):
            return
        if self._file is None:
            larger = self.rows.new_empty(capacity, *self.rows.shape[1:])
            larger[: len(self.rows)] = self.rows
            self.rows = larger
            return
        size = capacity * self._row_bytes
        allocate(self._file, size)
        self._mapping = mmap.mmap(self._file.fileno(), size)
        self.rows = torch.frombuffer(self._mapping, dtype=self.rows.dtype).view(capacity, *self.rows.shape[1:])

    def release(self, first: int, end: int) -> None:
        """Take rows out of RAM that lie in a file: they are read again when they are next needed."""
        if self._mapping is not None and end > first:
            start = first * self._row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            self._mapping.madvise(mmap.MADV_DONTNEED, start, end * self._row_bytes - start)

    def pieces(self, count: int) -> Iterator[Tensor]:
        """The first `count` rows in order, a few at a time, each few released once the next are asked for."""
        step = max(1, PIECE_BYTES // max(1, self._row_bytes))
        for first in range(0, count, step):
            end = min(first + step, count)
            yield self.rows[first:end]
            self.release(first, end)


def allocate(file: BinaryIO, size: int) -> None:
    """Make a file at least `size` bytes long, on the disk too, so that no later write into a mapping finds it full.

    Raises:
        MemoryFileError: there is no room.
    """
    held = os.fstat(file.fileno()).st_size
    if size <= held:
        return
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), held, size - held)
        else:  # macOS
            for first in range(held, size, PIECE_BYTES):
                os.pwrite(file.fileno(), bytes(min(PIECE_BYTES, size - first)), first)
    except OSError as error:
        why = f"there is no room for {(size - held) / 1e6:.0f} MB more ({error.strerror})"
        raise MemoryFileError(file.name, why, "free some space, or choose another place") from error
