# SPDX-License-Identifier: Apache-2.0
"""A video's memory as an object that grows frame by frame, is asked any number of times, and is kept in a file."""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import torch
from torch import Tensor

import hourllava_ext as ext
from hourllava.errors import MemoryFileError, ModelError

from .pages import PAGE_SIZE, MemoryPages, batches, frame_slots, open_pages, page_count, rows_in_use
from .pool import Pool
from .sharding import Shard
from .storage import Pieces, as_bytes, read_memory_file, write_memory_file
from .writer import SUMMARY_ROWS, Journal, MemoryShape, MemoryWriter, check_pictures, summary_dtype

# A memory in files grows by this share of what it holds, and by so many frames at the most: growing moves nothing,
# and files are never much larger than what they hold.
FILE_SHARE, FILE_GROWTH = 16, 256


@dataclass(frozen=True)
class MemoryPrefix:
    """The first seconds of a memory, as they were when it was asked for; appending changes nothing in it."""

    frames: int
    tokens: Tensor  # (T, N, C)
    pages: list[MemoryPages]  # one entry a block
    shard: Shard | None = None  # where all frames lie, if `tokens` and `pages` are only those of one process


class VideoMemory:
    """The memory of one video at one frame per second; made by `model.watch`.

    Args:
        shape: sizes of everything it holds.
        fingerprint: of the model that makes it.
        device: where its tensors live.
        files: gives an open file by a name, to keep the tensors in files and not in RAM: however long the video, only
            what is being written or read is resident. For memories on the CPU; None keeps them in RAM.
        private: leave those files as they are and keep changes to this process.

    Attributes:
        frames: seconds watched, T.
        timings: seconds spent so far on "decode", "encode" and "write".
        damage: one line on what of the video could not be read, or None.
        path: the file that the memory was loaded from, or None.
        source: absolute path of the video that was watched, or None; the memory does not need it.
        skipped: seconds of the video before the next one that are not here, since other processes hold them.
    """

    def __init__(
        self,
        shape: MemoryShape,
        fingerprint: str,
        device: torch.device,
        files: Callable[[str], BinaryIO] | None = None,
        private: bool = False,
    ) -> None:
        self.shape = shape
        self.fingerprint = fingerprint
        self.frames = 0
        self.timings = {"decode": 0.0, "encode": 0.0, "write": 0.0}
        self.damage: str | None = None
        self.path: str | None = None
        self.source: str | None = None
        self.skipped = 0
        self._writer: MemoryWriter | None = None
        self._journal: Journal | None = None
        self._lock = threading.Lock()  # held while rows are written
        self._appending = threading.Lock()  # held from the first frame of an append to its last, and while saving
        self._in_files = files is not None and device.type == "cpu"

        def pool(name: str, *row: int, dtype: torch.dtype = shape.dtype) -> Pool:
            file = files(name) if files is not None and self._in_files else None
            return Pool(row, dtype, device, file, private)

        blocks, page = range(shape.blocks), (shape.kv_heads, PAGE_SIZE, shape.head_dim)
        self._tokens = pool("tokens", shape.per_frame, shape.width)
        self._keys = [pool(f"blocks.{b}.key_pages", *page) for b in blocks]
        self._values = [pool(f"blocks.{b}.value_pages", *page) for b in blocks]
        summary, wide = (shape.kv_heads, SUMMARY_ROWS, shape.head_dim), summary_dtype(shape.dtype)
        self._summaries = [pool(f"blocks.{b}.key_summary", *summary, dtype=wide) for b in blocks]

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

    def prefix(self) -> MemoryPrefix:
        """What is remembered now. Threads may append meanwhile and afterwards: the prefix stays as it is."""
        with self._lock:
            count, open_now = self.num_pages, open_pages(self.frames, self.shape.per_frame)
            summaries = [pool.frozen(count, open_now) for pool in self._summaries]
            pages = [replace(p, key_summary=s) for p, s in zip(self.pages, summaries, strict=True)]
            return MemoryPrefix(self.frames, self.tokens, pages)

    def attach(self, writer: MemoryWriter) -> None:
        """Let `append` use this model; it must be the one that the memory was made by.

        Raises:
            MemoryFileError: another model made it.
        """
        self.check_model(writer.fingerprint())
        self._writer = writer

    def close(self) -> None:
        """Append no more, and let other processes append to what is kept of it; it can still be asked."""
        self._writer = None
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def check_model(self, fingerprint: str) -> None:
        """Raise MemoryFileError unless a model with this fingerprint made the memory."""
        check_fingerprint(self.path or "memory", fingerprint, self.fingerprint)

    @torch.no_grad()
    def append(self, frames: Tensor) -> None:
        """Add the video's next seconds.

        Args:
            frames: (n, 3, H, W) uint8 RGB, one a second. The memory is the same, bit for bit, however the frames of a
                video are divided over calls: batches start at fixed frame numbers and are filled up with black.

        Raises:
            ModelError: no model is attached.
            MemoryFileError: the model has changed since; or what is appended cannot be kept.
            VideoError: these are no such frames.
        """
        check_pictures(frames)
        with self._appending:
            writer, start = self._attached(), self.frames
            self.reserve(start + len(frames))
            second = start + self.skipped
            try:
                for first, end, offset in batches(second, second + len(frames), writer.batch):
                    self._append_batch(writer, frames[first - second : end - second], offset)
                if self._journal is not None and len(frames):
                    began = time.perf_counter()
                    self._journal.commit(start, self)
                    self.timings["write"] += time.perf_counter() - began
            except BaseException:
                if self._journal is not None:
                    self._journal.abandon()
                    self.frames = start  # what could not be kept was never remembered
                raise

    @torch.no_grad()
    def append_features(self, features: Tensor) -> None:
        """Add seconds of which the features (n, N, Cv) are kept already: `append` without the tower and the journal."""
        with self._appending:
            writer, second = self._attached(), self.frames + self.skipped
            self.reserve(self.frames + len(features))
            for first, end, offset in batches(second, second + len(features), writer.batch):
                self._write(writer, features[first - second : end - second].to(writer.device, self.shape.dtype), offset)

    def row_digest(self, first: int, end: int) -> str:
        """Hash of everything that frames `first` to `end` wrote: tokens, and keys and values of every block."""
        digest = hashlib.sha256()
        for start in range(first, end, FILE_GROWTH):
            frames = torch.arange(start, min(start + FILE_GROWTH, end))
            slots, _ = frame_slots(frames, self.shape.per_frame)
            digest.update(as_bytes(self._tokens.rows[start : start + len(frames)]))
            for pool in (*self._keys, *self._values):
                digest.update(as_bytes(pool.rows[slots // PAGE_SIZE, :, slots % PAGE_SIZE]))
        return digest.hexdigest()

    def refresh_summaries(self) -> None:
        """Make the summaries of the open pages those of the rows in use, whatever was written behind them."""
        for page in open_pages(self.frames, self.shape.per_frame):
            for keys, summaries in zip(self._keys, self._summaries, strict=True):
                summaries.rows[page] = summary_of(keys.rows[page], int(self.page_lengths[page]))

    def reserve(self, frames: int, exactly: bool = False) -> None:
        """Make room for so many frames in all, and unless `exactly` for some more where growing often is dear.

        Raises:
            MemoryFileError: the memory lives in files, and the disk has no room for them.
        """
        held = len(self._tokens.rows)
        if frames <= held:
            return
        if not exactly:
            more = min(held // FILE_SHARE, FILE_GROWTH) if self._in_files else held // 2
            frames = max(frames, held + more)
        self._tokens.reserve(frames)
        for pool in self._page_pools():
            pool.reserve(page_count(frames, self.shape.per_frame))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the memory to a file, which either holds all of it or is what it was before. Appends wait meanwhile.

        Raises:
            MemoryFileError: the file cannot be written.
        """
        with self._appending:  # but asked it can be meanwhile
            tensors = {
                name: Pieces(pool.rows.dtype, (count, *pool.rows.shape[1:]), pool.pieces(count))
                for name, (pool, count) in self._named_pools().items()
            }
            write_memory_file(path, tensors, self._notes())

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> "VideoMemory":
        """Read a saved memory, attached to no model; asking needs no more, appending `model.attach`.

        Args:
            path: the file.
            device: the model's, or each question brings all of its pages there.

        Raises:
            MemoryFileError: the file is missing, damaged, or not a memory.
        """
        found, notes = read_memory_file(path)
        memory = cls._of({name: tensor.to(device) for name, tensor in found.items()}, notes)
        memory.path = os.fspath(path)
        return memory

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what another process gets, is like a memory that was saved and loaded: in RAM, without a model."""
        with self._lock:
            tensors = {name: pool.rows[:count].clone() for name, (pool, count) in self._named_pools().items()}
        return VideoMemory._of, (tensors, self._notes())

    @classmethod
    def _of(cls, tensors: dict[str, Tensor], notes: dict[str, str]) -> "VideoMemory":
        """The memory of tensors and notes that have been saved."""
        keys, tokens = tensors["blocks.0.key_pages"], tensors["tokens"]
        blocks = sum(name.endswith("key_pages") for name in tensors)
        shape = MemoryShape(tokens.shape[1], tokens.shape[2], blocks, keys.shape[1], keys.shape[3], tokens.dtype)
        memory = cls(shape, notes["model"], tokens.device)
        memory.frames, memory.damage = len(tokens), notes["damage"] or None
        memory.source = notes.get("source") or None  # files of earlier versions do not say
        memory._tokens = Pool.of(tokens)
        memory._keys = [Pool.of(tensors[f"blocks.{block}.key_pages"]) for block in range(blocks)]
        memory._values = [Pool.of(tensors[f"blocks.{block}.value_pages"]) for block in range(blocks)]
        memory._summaries = [Pool.of(tensors[f"blocks.{block}.key_summary"]) for block in range(blocks)]
        return memory

    def _named_pools(self) -> dict[str, tuple[Pool, int]]:
        """Where each tensor of a saved memory is, and how many of its rows are in use."""
        named = {"tokens": (self._tokens, self.frames)}
        for block in range(self.shape.blocks):
            named[f"blocks.{block}.key_pages"] = self._keys[block], self.num_pages
            named[f"blocks.{block}.value_pages"] = self._values[block], self.num_pages
            named[f"blocks.{block}.key_summary"] = self._summaries[block], self.num_pages
        return named

    def _notes(self) -> dict[str, str]:
        return {"model": self.fingerprint, "damage": self.damage or "", "source": self.source or ""}

    def _attached(self) -> MemoryWriter:
        if self._writer is None:
            raise ModelError("memory", "no model is attached to it", "call model.attach(memory) before appending")
        self.check_model(self._writer.fingerprint())  # other weights, or of another dtype, make another memory
        return self._writer

    def _append_batch(self, writer: MemoryWriter, frames: Tensor, offset: int) -> None:
        """Encode and write frames of one batch, the first of which stands at `offset` in it."""
        started = time.perf_counter()
        whole = frames.new_zeros(writer.batch, *frames.shape[1:], device=writer.device)
        whole[offset : offset + len(frames)] = frames
        features = writer.encode(whole)[offset : offset + len(frames)]
        self.timings["encode"] += time.perf_counter() - started
        if self._journal is not None:
            features = self._journal.keep(features)
        self._write(writer, features, offset)

    def _write(self, writer: MemoryWriter, features: Tensor, offset: int) -> None:
        """Project and write the features of frames of one batch, the first of which stands at `offset` in it."""
        started, count = time.perf_counter(), len(features)
        whole = features.new_zeros(writer.batch, *features.shape[1:])
        whole[offset : offset + count] = features
        tokens = writer.project(whole)
        projected = writer.keys_values(tokens)
        per_frame, end = self.shape.per_frame, self.frames + count
        slots, position_ids = frame_slots(torch.arange(self.frames, end, device=self.device), per_frame)
        position_ids += self.skipped * (per_frame + 1)
        # Only the pages that get rows are shown to the operator, whose checks take time for every page it is shown.
        first, pages = int(slots.min()) // PAGE_SIZE, page_count(end, per_frame)
        inside, lengths = slots - first * PAGE_SIZE, rows_in_use(end, per_frame, self.device, first)
        inv_freq = writer.inv_freq.to(self.device)
        with self._lock:
            self._tokens.rows[self.frames : end] = tokens[offset : offset + count]
            self._clear_pages(self.num_pages, pages)
            for block, keys_values in enumerate(projected):
                # A memory in files stays there, wherever the model is.
                key, value = (self._of_frames(r, writer.batch, offset, count).to(self.device) for r in keys_values)
                keys, values, summaries = (
                    pools[block].rows[first:pages] for pools in (self._keys, self._values, self._summaries)
                )
                ext.page_write_(key, value, position_ids, inside, inv_freq, keys, values, summaries, lengths)
            before, self.frames = self.frames, end
        self._tokens.release(before, end)
        for pool in self._page_pools():
            pool.release(first, pages)
        self.timings["write"] += time.perf_counter() - started

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


def check_fingerprint(what: object, model: str, maker: str) -> None:
    """Raise MemoryFileError unless the model with fingerprint `model` is the one that made a memory."""
    if model != maker:
        raise MemoryFileError(what, "it was made by another model", "use that model, or watch the video again")


def summary_of(keys: Tensor, length: int) -> Tensor:
    """The summary (Hkv, 3, D) of the first `length` rows of a page's keys (Hkv, 128, D)."""
    rows, slots = keys[:, :length].transpose(0, 1), torch.arange(length, device=keys.device)
    unrotated = torch.empty(0, dtype=torch.float32, device=keys.device)
    return ext.page_write(rows, rows, torch.zeros_like(slots), slots, unrotated, 1, PAGE_SIZE)[2][0]
