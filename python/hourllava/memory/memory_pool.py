# SPDX-License-Identifier: Apache-2.0
"""Many memories within a stated budget: on the device that reads them, on the host, else only on the disk."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from hourllava.errors import AdmissionError, MemoryFileError

from .catalogue import Video
from .pages import MemoryPages, open_pages, page_count
from .pool import Pool, scratch_files
from .repository import Repository, pool_files
from .sizes import format_size, parse_size
from .tier import PageTier
from .video_memory import MemoryPrefix, check_fingerprint
from .writer import MemoryWriter


@dataclass(frozen=True)
class HeldMemory:
    """A video's memory as a pool holds it while it is being asked; appending changes nothing in it.

    Its tokens stay in the file that the repository keeps them in: a question reads few of them.
    """

    name: str
    frames: int
    fingerprint: str  # of the model that made it
    damage: str | None  # one line on what of the video could not be read
    path: str
    tokens: Tensor  # (T, N, C), on the CPU
    pages: list[MemoryPages]  # one entry a block, on the model's device

    def prefix(self) -> MemoryPrefix:
        """What a question reads."""
        return MemoryPrefix(self.frames, self.tokens, self.pages)

    def check_model(self, fingerprint: str) -> None:
        """Raise MemoryFileError unless a model with this fingerprint made the memory."""
        check_fingerprint(self.path, fingerprint, self.fingerprint)


@dataclass(frozen=True)
class TierUsage:
    """How full one tier of a pool is, in bytes."""

    tier: str
    budget: int
    used: int
    reclaimable: int  # of those used: what evicting every memory that no question reads would free
    memories: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """Where a memory's pages lie."""

    video: Video  # as it was when they were filled
    tier: PageTier
    lease: int
    table: Tensor  # (pages,) int64: the tier's page for each of the memory's
    memory: HeldMemory | None = None  # what a question reads, where it can


class MemoryPool:
    """Holds memories of a repository for one model, and never takes more than its budgets.

    A memory comes in when it is first asked and stays until others need its room: then the one that was asked least
    recently goes, to the host if there is a budget for that, else it is only on the disk again. What a running question
    reads never goes. Any number of threads may ask; bringing memories in is done one at a time.

    Args:
        repository: where they are kept. Ready pages (`hourllava watch --into ... --pages`) are read; of other videos
            they are made from the features each time they come in, in nameless files of the repository's folder.
        writer: the model.
        budget: bytes for pages on the model's device, such as "6GiB". It is taken at once, so that nothing runs out of
            it later.
        host_budget: bytes of the host's RAM for pages that had to leave a GPU; None for no such tier.

    Raises:
        AdmissionError: a budget is smaller than a page, or the machine has not so much.
        InputError: a budget is no size.
    """

    def __init__(
        self,
        repository: Repository,
        writer: MemoryWriter,
        budget: str | int,
        host_budget: str | int | None = None,
    ) -> None:
        self._repository, self._writer = repository, writer
        self._fingerprint, self._shape = writer.fingerprint(), writer.shape
        device = writer.device
        self._device = PageTier(str(device), writer.shape, device, parse_size(budget))
        self._host: PageTier | None = None
        if host_budget is not None:
            host = torch.device("cpu")
            self._host = PageTier("host", writer.shape, host, parse_size(host_budget), pinned=device.type == "cuda")
        self._entries: dict[str, _Entry] = {}
        self._admission = threading.Lock()  # held while memories move

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[HeldMemory]:
        """The memory of a video as committed now, held on the model's device until the block ends.

        Raises:
            AdmissionError: its pages do not fit into the budget, or not as long as others are being read.
            MemoryFileError: there is no such video; it has no frame yet; it is damaged; or it is another tower's.
        """
        entry = self._pinned(name)
        assert entry.memory is not None
        try:
            yield entry.memory
        finally:
            entry.tier.allocator.unpin(entry.lease)

    def forget(self, name: str) -> None:
        """Let go of a memory, as soon as no question reads it."""
        with self._admission:
            self._release(name)

    def usage(self) -> list[TierUsage]:
        """How full each tier is, the device's first."""
        tiers = [self._device] if self._host is None else [self._device, self._host]
        entries, found = sorted(self._entries.copy().items()), []
        for tier in tiers:
            total, free, reclaimable = tier.allocator.counts()
            names = tuple(name for name, entry in entries if entry.tier is tier)
            size = self._shape.page_bytes
            found.append(TierUsage(tier.name, tier.budget, (total - free) * size, reclaimable * size, names))
        return found

    def _pinned(self, name: str) -> _Entry:
        """The memory as committed now, pinned on the device."""
        try:
            video = self._repository.catalogue.video(name)
        except MemoryFileError:
            self.forget(name)
            raise
        entry = self._entries.get(name)
        ready = entry is not None and entry.memory is not None and entry.video == video
        if entry is not None and ready and entry.tier.allocator.pin(entry.lease):
            return entry
        with self._admission:
            return self._brought_in(self._repository.catalogue.video(name))

    def _brought_in(self, video: Video) -> _Entry:
        self._check(video)
        old = self._entries.get(video.name)
        if old is not None and old.video.created == video.created and old.video.frames <= video.frames:
            old.tier.allocator.pin(old.lease)  # what is known of it must not go to make room for the rest
            try:
                if old.memory is not None and old.video == video:
                    old.tier.allocator.pin(old.lease)
                    return old
                with contextlib.suppress(AdmissionError):  # it may fit once the pages are gone that it replaces
                    return self._filled(video, old)
            finally:
                old.tier.allocator.unpin(old.lease)
        self._release(video.name)
        return self._filled(video, None)

    def _filled(self, video: Video, old: _Entry | None) -> _Entry:
        """Pages for a video on the device: those of the entry that is there, if any, and the rest from the disk."""
        count = page_count(video.frames, self._shape.per_frame)
        known = torch.zeros(count, dtype=torch.bool)
        if old is not None:
            known[: len(old.table)] = True
            if old.video.frames < video.frames:
                # Pages that later frames write to are not what they were: a question may be reading those.
                known[open_pages(old.video.frames, self._shape.per_frame)] = False
        numbers = known.nonzero()[:, 0]
        shared = old.table[numbers] if old is not None and old.tier is self._device else numbers[:0]
        lease, fresh = self._taken(self._device, count - len(shared), shared, video.name)
        table = torch.empty(count, dtype=torch.int64)
        try:
            if len(shared):
                table[known], table[~known] = shared, fresh
            else:
                table[:] = fresh
                if old is not None:
                    self._device.copy(table[known], old.tier, old.table[numbers])
            files = self._files(video)
            self._device.read(table[~known], files, (~known).nonzero()[:, 0], video.frames)
            entry = _Entry(video, self._device, lease, table, self._memory_of(video, table, files))
        except BaseException:
            self._device.allocator.unpin(lease)
            self._device.allocator.release(lease)
            raise
        self._release(video.name)
        self._entries[video.name] = entry
        return entry

    def _files(self, video: Video) -> Callable[[str], BinaryIO]:
        """Opens files with a video's pages by name: those that are kept, or some that are made now and soon gone."""
        if video.pages and video.model == self._fingerprint:
            return pool_files(self._repository.folder / video.name, append=False)
        made: dict[str, BinaryIO] = {}
        scratch = scratch_files(self._repository.folder)
        self._repository.rebuilt(video, self._writer, lambda name: made.setdefault(name, scratch(name)))
        return lambda name: os.fdopen(os.dup(made[name].fileno()), "rb")

    def _memory_of(self, video: Video, table: Tensor, files: Callable[[str], BinaryIO]) -> HeldMemory:
        shape, folder = self._shape, self._repository.folder / video.name
        with files("tokens") as file:
            tokens = Pool((shape.per_frame, shape.width), shape.dtype, torch.device("cpu"), file, private=True)
            tokens.reserve(video.frames)
        pages = self._device.of_memory(table)
        return HeldMemory(
            video.name, video.frames, self._fingerprint, video.damage or None, str(folder), tokens.rows, pages
        )

    def _check(self, video: Video) -> None:
        self._repository.check_tower(video, self._writer)
        if not video.frames:
            path = self._repository.folder / video.name
            raise MemoryFileError(path, "it holds no frame yet", "append to it first")

    def _taken(self, tier: PageTier, fresh: int, shared: Tensor, name: str) -> tuple[int, Tensor]:
        """A lease in a tier, for which others have made room."""
        victims = tier.allocator.evict(fresh)
        taken = None
        if victims is not None:
            for lease in victims:
                self._move_down(tier, lease)
            taken = tier.allocator.take(fresh, shared)
        if taken is None:
            raise self._refusal(tier, fresh, name)
        return taken

    def _refusal(self, tier: PageTier, pages: int, name: str) -> AdmissionError:
        total, free, reclaimable = tier.allocator.counts()
        size = self._shape.page_bytes
        asked, could = (format_size(n * size) for n in (pages, reclaimable))
        why = (
            f"it asks for {asked} of pages, but of the budget of {format_size(tier.budget)} on {tier.name} "
            f"{format_size(free * size)} are free and {could} more could be freed"
        )
        todo = "raise the budget" if pages > total else "ask again when running questions are done, or raise the budget"
        return AdmissionError(name, why, todo)

    def _move_down(self, tier: PageTier, lease: int) -> None:
        """Take an evicted memory out of a tier: to the host, if it comes from the device and there is room."""
        name, entry = next((n, e) for n, e in self._entries.items() if e.tier is tier and e.lease == lease)
        del self._entries[name]
        host = self._host
        try:
            if tier is self._device and host is not None:
                with contextlib.suppress(AdmissionError):  # then it is only on the disk
                    moved, pages = self._taken(host, len(entry.table), entry.table[:0], name)
                    host.copy(pages, tier, entry.table)
                    host.allocator.unpin(moved)
                    self._entries[name] = _Entry(entry.video, host, moved, pages)
        finally:
            tier.allocator.release(lease)

    def _release(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None:
            entry.tier.allocator.release(entry.lease)
