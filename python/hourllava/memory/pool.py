# SPDX-License-Identifier: Apache-2.0
"""Rows that grow in number: in RAM or on a GPU, or in a mapped file whose bytes need not stay in RAM."""

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from hourllava.errors import MemoryFileError, StorageError

PIECE_BYTES = 8 << 20  # read or released at once


class Pool:
    """A tensor that grows along its first dim.

    Args:
        row: shape of a row.
        dtype, device: of all rows.
        file: where the rows live, an open file of the caller's (CPU only); None keeps them in memory.
        private: show the file's bytes, but keep what is written here to this process.

    Attributes:
        rows: (capacity, *row). A tensor taken before `reserve` stays valid; in a file it goes on showing the same
            bytes, in memory it is a copy from then on.
    """

    def __init__(
        self,
        row: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        file: BinaryIO | None = None,
        private: bool = False,
    ) -> None:
        self.rows = torch.empty(0, *row, dtype=dtype, device=device)
        self._file = file
        self._private = private
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
            MemoryFileError: the disk has no room for them, or a private file does not hold so many.
        """
        if capacity <= len(self.rows):
            return
        if self._file is None:
            larger = self.rows.new_empty(capacity, *self.rows.shape[1:])
            larger[: len(self.rows)] = self.rows
            self.rows = larger
            return
        size = capacity * self._row_bytes
        if not self._private:
            allocate(self._file, size)
        elif os.fstat(self._file.fileno()).st_size < size:
            raise MemoryFileError(self._file.name, "it is shorter than it should be", "run `hourllava memory repair`")
        access = mmap.ACCESS_COPY if self._private else mmap.ACCESS_WRITE
        self._mapping = mmap.mmap(self._file.fileno(), size, access=access)
        self.rows = torch.frombuffer(self._mapping, dtype=self.rows.dtype).view(capacity, *self.rows.shape[1:])

    def release(self, first: int, end: int) -> None:
        """Take rows out of RAM that lie in a file: they are read again when they are next needed."""
        if self._mapping is not None and not self._private and end > first:
            start = first * self._row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            self._mapping.madvise(mmap.MADV_DONTNEED, start, end * self._row_bytes - start)

    def frozen(self, count: int, changing: list[int]) -> Tensor:
        """The first `count` rows as they are now, whatever is written to the rows `changing` later."""
        if self._file is None:
            return self.rows[:count].clone()
        if not count:
            return self.rows[:0]
        mapping = mmap.mmap(self._file.fileno(), count * self._row_bytes, access=mmap.ACCESS_COPY)
        rows = torch.frombuffer(mapping, dtype=self.rows.dtype).view(count, *self.rows.shape[1:])
        rows[changing] = self.rows[changing]  # writing makes the file's pages private that hold them
        return rows

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
        StorageError: there is no room.
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
        what = file.name if isinstance(file.name, str) else "memory"
        raise StorageError(what, why, "free some space, or choose another place") from error


def scratch_files(folder: str | os.PathLike[str]) -> Callable[[str], BinaryIO]:
    """Makes files in `folder` that have no name there and are gone when they are closed."""

    def make(_: str) -> BinaryIO:
        try:
            handle, name = tempfile.mkstemp(dir=folder, prefix=".hourllava-")
            os.unlink(name)
        except OSError as error:
            why = f"no file can be made there ({error.strerror})"
            raise StorageError(Path(folder), why, "choose another place") from error
        return cast(BinaryIO, os.fdopen(handle, "r+b"))

    return make
