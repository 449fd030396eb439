# SPDX-License-Identifier: Apache-2.0
"""A video's memory that is too large for one process: each of a group holds some of its minutes."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch import distributed as dist

from hourllava.errors import HourLlavaError

from .pages import PAGE_SIZE
from .sharding import Shard, least_loaded
from .video_memory import MemoryPrefix, VideoMemory
from .writer import MemoryWriter, check_pictures

RUN = PAGE_SIZE  # neighbouring seconds that stay together: they fill pages of both kinds, those of one process


def found_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group that shares a memory; None is the default one.

    Raises:
        HourLlavaError: there is none yet.
    """
    found = group or (dist.group.WORLD if dist.is_initialized() else None)
    if found is None:
        todo = "start the processes with torchrun, and call torch.distributed.init_process_group() on each"
        raise HourLlavaError("torch.distributed", "there is no group of processes to share a memory", todo)
    return found


class ShardedMemory:
    """A memory that is appended to and asked by all ranks of a torch.distributed group together.

    Every rank makes one and calls every method with the same arguments, in the same order. Every second is encoded and
    kept by one rank: runs of 128 go to the rank that holds the least when they begin. What a rank keeps of a second,
    and where, does not depend on how the frames were divided over calls.

    Args:
        writer: the model, the same on every rank.
        group: the ranks; None is the default group, which `dist.init_process_group` makes.
        held: frames that this rank holds of other memories, which count as its load.

    Attributes:
        frames: seconds watched by all, T.
        damage, path, source, timings: as of a `VideoMemory`; the seconds are this rank's.
    """

    def __init__(self, writer: MemoryWriter, group: dist.ProcessGroup | None = None, held: int = 0) -> None:
        self._own = VideoMemory(writer.shape, writer.fingerprint(), writer.device)
        self._own.attach(writer)
        self._group, self._rank = found_group(group), dist.get_rank(group)
        self._owners: list[int] = []  # of each run
        self._loads: list[int] = [0] * dist.get_world_size(group)
        dist.all_gather_object(self._loads, held, group)
        self.frames = 0
        self.timings = self._own.timings
        self.damage: str | None = None
        self.path: str | None = None
        self.source: str | None = None

    @property
    def own(self) -> VideoMemory:
        """What this rank holds."""
        return self._own

    def append(self, frames: Tensor) -> None:
        """Add the video's next seconds, (n, 3, H, W) uint8 RGB; only their owner looks at them.

        Raises:
            HourLlavaError: as `VideoMemory.append`.
        """
        check_pictures(frames)
        self._append(frames, self._own.append)

    def append_features(self, features: Tensor) -> None:
        """Add seconds whose features (n, N, Cv) are there already; only their owner looks at them."""
        self._append(features, self._own.append_features)

    def reserve(self, frames: int) -> None:
        """Make room for a video of so many frames: this rank's part of it."""
        self._own.reserve(-(-frames // len(self._loads)))

    def check_model(self, fingerprint: str) -> None:
        """Raise MemoryFileError unless a model with this fingerprint made the memory."""
        self._own.check_model(fingerprint)

    def prefix(self) -> MemoryPrefix:
        """What is remembered now: this rank's tokens and pages, and where the others are."""
        own = self._own.prefix()
        owner = torch.tensor(self._owners, dtype=torch.int64).repeat_interleave(RUN)[: self.frames]
        return MemoryPrefix(self.frames, own.tokens, own.pages, Shard(self._group, owner))

    def _append(self, rows: Tensor, append: Callable[[Tensor], None]) -> None:
        while len(rows):
            run, held = divmod(self.frames, RUN)
            if not held:
                self._owners.append(least_loaded(self._loads))
            now, rows = rows.split([min(RUN - held, len(rows)), max(0, len(rows) - RUN + held)])
            if self._owners[run] == self._rank:
                self._own.skipped = self.frames - self._own.frames
                append(now)
            self._loads[self._owners[run]] += len(now)
            self.frames += len(now)
