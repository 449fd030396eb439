# SPDX-License-Identifier: Apache-2.0
"""A video's memory as an object that grows frame by frame, is asked any number of times, and is kept in a file."""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import torch
from torch import Tensor

import hourllava_ext as ext
from hourllava.errors import MemoryFileError, ModelError

from .pages import PAGE_SIZE, MemoryPages, frame_slots, page_count, rows_in_use
from .pool import Pool
from .storage import Pieces, read_memory_file, write_memory_file

FILE_GROWTH = 256  # frames that a memory in files grows by; growing moves nothing there


@dataclass(frozen=True)
class MemoryShape:
    """Sizes of everything a memory holds, per frame and per block."""

    per_frame: int  # visual tokens of a frame
    width: int  # channels of a token
    blocks: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


class MemoryWriter(Protocol):
    """What makes memory of frames: a model."""

    shape: MemoryShape
    device: torch.device
    inv_freq: Tensor  # float32 (F,)
    batch: int  # frames are encoded in batches that start at multiples of this

    def fingerprint(self) -> str:
        """Identifies everything that the memory's contents depend on besides the frames."""

    def encode(self, frames: Tensor) -> Tensor:
        """Visual tokens (n, N, C) of frames (n, 3, H, W)."""

    def keys_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every block's unrotated keys and values, (n * (N + 1), Hkv, D), of tokens (n, N, C) and then n newlines."""


class VideoMemory:
    """The memory of one video at one frame per second; made by `model.watch`.

    Args:
        shape: sizes of everything it holds.
        fingerprint: of the model that makes it.
        device: where its tensors live.
        folder: keep them in files of this folder, which vanish with the memory, and not in RAM: however long the video,
            only what is being written or read is resident. For memories on the CPU; None keeps them in RAM.

    Attributes:
        frames: seconds watched, T.
        timings: seconds spent so far on "decode", "encode" and "write".
        damage: one line on what of the video could not be read, or None.
        path: the file that the memory was loaded from, or None.
    """

    def __init__(
        self,
        shape: MemoryShape,
        fingerprint: str,
        device: torch.device,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.shape = shape
        self.fingerprint = fingerprint
        self.frames = 0
        self.timings = {"decode": 0.0, "encode": 0.0, "write": 0.0}
        self.damage: str | None = None
        self.path: str | None = None
        self._writer: MemoryWriter | None = None
        self._folder = folder if device.type == "cpu" else None

        def pool(*row: int, dtype: torch.dtype = shape.dtype) -> Pool:
            return Pool(row, dtype, device, _scratch_file(self._folder))

        blocks = range(shape.blocks)
        self._tokens = pool(shape.per_frame, shape.width)
        self._keys = [pool(shape.kv_heads, PAGE_SIZE, shape.head_dim) for _ in blocks]
        self._values = [pool(shape.kv_heads, PAGE_SIZE, shape.head_dim) for _ in blocks]
        wide = torch.promote_types(shape.dtype, torch.float32)
        self._summaries = [pool(shape.kv_heads, 3, shape.head_dim, dtype=wide) for _ in blocks]

    @property
    def device(self) -> torch.device:
        return self._tokens.rows.device

    @property
    def tokens(self) -> Tensor:
        """Projected visual tokens (T, N, C)."""
        return self._tokens.rows[: self.frames]

    @property
    def num_pages(self) -> int:
        """Pages in use, of both kinds."""
        return page_count(self.frames, self.shape.per_frame)

    @property
    def page_lengths(self) -> Tensor:
        """Rows in use of every page, (P,) int32."""
        return rows_in_use(self.frames, self.shape.per_frame, self.device)

    @property
    def pages(self) -> list[MemoryPages]:
        """Every block's pages, with a table (1, P) that lists them all."""
        count, lengths = self.num_pages, self.page_lengths
        table = torch.arange(count, dtype=torch.int32, device=self.device)[None]
        blocks = zip(self._keys, self._values, self._summaries, strict=True)
        return [MemoryPages(k.rows[:count], v.rows[:count], s.rows[:count], lengths, table) for k, v, s in blocks]

    def attach(self, writer: MemoryWriter) -> None:
        """Let `append` use this model; it must be the one that the memory was made by.

        Raises:
            MemoryFileError: another model made it.
        """
        self.check_model(writer.fingerprint())
        self._writer = writer

    def check_model(self, fingerprint: str) -> None:
        """Raise MemoryFileError unless a model with this fingerprint made the memory."""
        if fingerprint != self.fingerprint:
            todo = "use that model, or watch the video again"
            raise MemoryFileError(self.path or "memory", "it was made by another model", todo)

    @torch.no_grad()
    def append(self, frames: Tensor) -> None:
        """Add the video's next seconds.

        Args:
            frames: (n, 3, H, W) uint8 RGB, one a second. The memory is the same, bit for bit, however the frames of a
                video are divided over calls: batches start at fixed frame numbers and are filled up with black.

        Raises:
            ModelError: no model is attached.
        """
        if self._writer is None:
            raise ModelError("memory", "no model is attached to it", "call model.attach(memory) before appending")
        batch = self._writer.batch
        self.reserve(self.frames + len(frames))
        done = 0
        while done < len(frames):
            offset = self.frames % batch
            count = min(batch - offset, len(frames) - done)
            self._append_batch(self._writer, frames[done : done + count].to(self._writer.device), offset)
            done += count

    def reserve(self, frames: int) -> None:
        """Make room for so many frames in all, and for some more where growing often is dear.

        Raises:
            MemoryFileError: the memory lives in files, and the disk has no room for them.
        """
        held = len(self._tokens.rows)
        if frames <= held:
            return
        frames = max(frames, held + FILE_GROWTH) if self._folder else max(frames, held * 3 // 2)
        self._tokens.reserve(frames)
        for pool in self._page_pools():
            pool.reserve(page_count(frames, self.shape.per_frame))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the memory to a file, which either holds all of it or is what it was before.

        Raises:
            MemoryFileError: the file cannot be written.
        """
        named = {"tokens": self._tokens}
        for block in range(self.shape.blocks):
            named[f"blocks.{block}.key_pages"] = self._keys[block]
            named[f"blocks.{block}.value_pages"] = self._values[block]
            named[f"blocks.{block}.key_summary"] = self._summaries[block]
        tensors = {}
        for name, pool in named.items():
            count = self.frames if pool is self._tokens else self.num_pages
            tensors[name] = Pieces(pool.rows.dtype, (count, *pool.rows.shape[1:]), pool.pieces(count))
        write_memory_file(path, tensors, {"model": self.fingerprint, "damage": self.damage or ""})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "VideoMemory":
        """Read a saved memory, on the CPU and attached to no model; asking needs no more, appending `model.attach`.

        Raises:
            MemoryFileError: the file is missing, damaged, or not a memory.
        """
        tensors, notes = read_memory_file(path)
        keys = tensors["blocks.0.key_pages"]
        tokens = tensors["tokens"]
        blocks = sum(name.endswith("key_pages") for name in tensors)
        shape = MemoryShape(tokens.shape[1], tokens.shape[2], blocks, keys.shape[1], keys.shape[3], tokens.dtype)
        memory = cls(shape, notes["model"], tokens.device)
        memory.frames, memory.damage, memory.path = len(tokens), notes["damage"] or None, os.fspath(path)
        memory._tokens = Pool.of(tokens)
        memory._keys = [Pool.of(tensors[f"blocks.{block}.key_pages"]) for block in range(blocks)]
        memory._values = [Pool.of(tensors[f"blocks.{block}.value_pages"]) for block in range(blocks)]
        memory._summaries = [Pool.of(tensors[f"blocks.{block}.key_summary"]) for block in range(blocks)]
        return memory

    def _append_batch(self, writer: MemoryWriter, frames: Tensor, offset: int) -> None:
        """Encode and write frames of one batch; the first of them stands at `offset` in it."""
        started = time.perf_counter()
        whole = frames.new_zeros(writer.batch, *frames.shape[1:])
        whole[offset : offset + len(frames)] = frames
        encoded = writer.encode(whole)
        projected = writer.keys_values(encoded)
        encoded_at = time.perf_counter()
        per_frame, end = self.shape.per_frame, self.frames + len(frames)
        self._tokens.rows[self.frames : end] = encoded[offset : offset + len(frames)]
        slots, position_ids = frame_slots(torch.arange(self.frames, end, device=frames.device), per_frame)
        # Only the pages that get rows are shown to the operator, whose checks take time for every page it is shown.
        first, pages = int(slots.min()) // PAGE_SIZE, page_count(end, per_frame)
        self._clear_pages(self.num_pages, pages)
        inside, lengths = slots - first * PAGE_SIZE, rows_in_use(end, per_frame, frames.device)[first:]
        for block, keys_values in enumerate(projected):
            key, value = (self._of_frames(rows, writer.batch, offset, len(frames)) for rows in keys_values)
            keys, values, summaries = (
                pools[block].rows[first:pages] for pools in (self._keys, self._values, self._summaries)
            )
            ext.page_write_(key, value, position_ids, inside, writer.inv_freq, keys, values, summaries, lengths)
        self._tokens.release(self.frames, end)
        for pool in self._page_pools():
            pool.release(first, pages)
        self.frames = end
        self.timings["encode"] += encoded_at - started
        self.timings["write"] += time.perf_counter() - encoded_at

    def _of_frames(self, rows: Tensor, batch: int, first: int, count: int) -> Tensor:
        """Of a batch's rows, first all visual and then all newline rows, those of `count` frames from `first` on."""
        visual, newline = rows.split([len(rows) - batch, batch])
        per_frame = self.shape.per_frame
        return torch.cat([visual[first * per_frame : (first + count) * per_frame], newline[first : first + count]])

    def _page_pools(self) -> list[Pool]:
        return [*self._keys, *self._values, *self._summaries]

    def _clear_pages(self, first: int, end: int) -> None:
        """Zero pages when they come into use, so that a saved memory holds no leftovers."""
        for pool in self._page_pools():
            pool.rows[first:end] = 0


def _scratch_file(folder: str | os.PathLike[str] | None) -> BinaryIO | None:
    """A file without a name, gone when it is closed; None without a folder."""
    if folder is None:
        return None
    try:
        handle, name = tempfile.mkstemp(dir=folder, prefix=".hourllava-")
        os.unlink(name)
        return cast(BinaryIO, os.fdopen(handle, "r+b"))
    except OSError as error:
        why = f"no file can be made there ({error.strerror})"
        raise MemoryFileError(Path(folder), why, "choose another place") from error
