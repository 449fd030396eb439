# SPDX-License-Identifier: Apache-2.0
"""A video's memory as an object that grows frame by frame, is asked any number of times, and is kept in a file."""

import os
import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import hourllava_ext as ext
from hourllava.errors import MemoryFileError, ModelError

from .pages import PAGE_SIZE, MemoryPages, frame_slots, page_count
from .storage import read_memory_file, write_memory_file


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

    Attributes:
        frames: seconds watched, T.
        page_lengths: (P,) int32, rows in use of every page.
        timings: seconds spent so far on "decode", "encode" and "write".
        damage: one line on what of the video could not be read, or None.
        path: the file that the memory was loaded from, or None.
    """

    def __init__(self, shape: MemoryShape, fingerprint: str, device: torch.device) -> None:
        self.shape = shape
        self.fingerprint = fingerprint
        self.frames = 0
        self.timings = {"decode": 0.0, "encode": 0.0, "write": 0.0}
        self.damage: str | None = None
        self.path: str | None = None
        self._writer: MemoryWriter | None = None
        pages, head = (0, shape.kv_heads), (shape.kv_heads, shape.head_dim)
        blocks = range(shape.blocks)
        self._tokens = torch.empty(0, shape.per_frame, shape.width, dtype=shape.dtype, device=device)
        self._keys = [torch.empty(*pages, PAGE_SIZE, head[1], dtype=shape.dtype, device=device) for _ in blocks]
        self._values = [torch.empty_like(keys) for keys in self._keys]
        summary_dtype = torch.promote_types(shape.dtype, torch.float32)
        self._summaries = [torch.empty(*pages, 3, head[1], dtype=summary_dtype, device=device) for _ in blocks]
        self._page_lengths = torch.empty(0, dtype=torch.int32, device=device)

    @property
    def tokens(self) -> Tensor:
        """Projected visual tokens (T, N, C)."""
        return self._tokens[: self.frames]

    @property
    def num_pages(self) -> int:
        """Pages in use, of both kinds."""
        return page_count(self.frames, self.shape.per_frame)

    @property
    def page_lengths(self) -> Tensor:
        return self._page_lengths[: self.num_pages]

    @property
    def pages(self) -> list[MemoryPages]:
        """Every block's pages, with a table (1, P) that lists them all."""
        count = self.num_pages
        table = torch.arange(count, dtype=torch.int32, device=self._tokens.device)[None]
        blocks = zip(self._keys, self._values, self._summaries, strict=True)
        return [MemoryPages(k[:count], v[:count], s[:count], self.page_lengths, table) for k, v, s in blocks]

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
        """Make room for so many frames in all, and for half as many again as now if the memory has to move."""
        if frames <= len(self._tokens):
            return
        frames = max(frames, len(self._tokens) * 3 // 2)
        pages = page_count(frames, self.shape.per_frame)
        self._tokens = _grown(self._tokens, frames)
        for block in range(self.shape.blocks):
            self._keys[block] = _grown(self._keys[block], pages)
            self._values[block] = _grown(self._values[block], pages)
            self._summaries[block] = _grown(self._summaries[block], pages)
        self._page_lengths = _grown(self._page_lengths, pages)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the memory to a file, which either holds all of it or is what it was before.

        Raises:
            MemoryFileError: the file cannot be written.
        """
        count = self.num_pages
        tensors = {"tokens": self.tokens, "page_lengths": self.page_lengths}
        for block in range(self.shape.blocks):
            tensors[f"blocks.{block}.key_pages"] = self._keys[block][:count]
            tensors[f"blocks.{block}.value_pages"] = self._values[block][:count]
            tensors[f"blocks.{block}.key_summary"] = self._summaries[block][:count]
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
        memory._tokens, memory._page_lengths = tokens, tensors["page_lengths"]
        memory._keys = [tensors[f"blocks.{block}.key_pages"] for block in range(blocks)]
        memory._values = [tensors[f"blocks.{block}.value_pages"] for block in range(blocks)]
        memory._summaries = [tensors[f"blocks.{block}.key_summary"] for block in range(blocks)]
        return memory

    def _append_batch(self, writer: MemoryWriter, frames: Tensor, offset: int) -> None:
        """Encode and write frames of one batch; the first of them stands at `offset` in it."""
        before = self.num_pages
        started = time.perf_counter()
        whole = frames.new_zeros(writer.batch, *frames.shape[1:])
        whole[offset : offset + len(frames)] = frames
        encoded = writer.encode(whole)
        projected = writer.keys_values(encoded)
        encoded_at = time.perf_counter()
        end = self.frames + len(frames)
        self._tokens[self.frames : end] = encoded[offset : offset + len(frames)]
        self._clear_pages(before, page_count(end, self.shape.per_frame))
        slots, position_ids = frame_slots(torch.arange(self.frames, end, device=frames.device), self.shape.per_frame)
        for block, keys_values in enumerate(projected):
            key, value = (self._of_frames(rows, writer.batch, offset, len(frames)) for rows in keys_values)
            pools = (self._keys[block], self._values[block], self._summaries[block], self._page_lengths)
            ext.page_write_(key, value, position_ids, slots, writer.inv_freq, *pools)
        self.frames = end
        self.timings["encode"] += encoded_at - started
        self.timings["write"] += time.perf_counter() - encoded_at

    def _of_frames(self, rows: Tensor, batch: int, first: int, count: int) -> Tensor:
        """Of a batch's rows, first all visual and then all newline rows, those of `count` frames from `first` on."""
        visual, newline = rows.split([len(rows) - batch, batch])
        per_frame = self.shape.per_frame
        return torch.cat([visual[first * per_frame : (first + count) * per_frame], newline[first : first + count]])

    def _clear_pages(self, first: int, end: int) -> None:
        """Zero pages when they come into use, so that a saved memory holds no leftovers."""
        for pool in (*self._keys, *self._values, *self._summaries, self._page_lengths):
            pool[first:end] = 0


def _grown(pool: Tensor, length: int) -> Tensor:
    larger = pool.new_empty(length, *pool.shape[1:])
    larger[: len(pool)] = pool
    return larger
