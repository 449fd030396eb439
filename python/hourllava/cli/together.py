# SPDX-License-Identifier: Apache-2.0
"""Under torchrun: processes meet, and each takes its part of a memory."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import distributed as dist

from hourllava.cli.watch import STAGES, is_kept, is_memory_file
from hourllava.errors import MemoryFileError

if TYPE_CHECKING:
    from hourllava.memory import ShardedMemory
    from hourllava.model import HourLlavaForConditionalGeneration


@contextlib.contextmanager
def processes() -> Iterator[int | None]:
    """This process' rank among those that torchrun has started, which are joined meanwhile; None if it has not."""
    if not dist.is_torchelastic_launched():
        yield None
        return
    dist.init_process_group()
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def take_part(
    model: "HourLlavaForConditionalGeneration", source: Path, progress: bool
) -> tuple["ShardedMemory", dict[str, float]]:
    """`take_in` for processes: this one's part of the memory of a video or of REPOSITORY/NAME, and its seconds.

    Raises:
        HourLlavaError: the file is neither, or cannot be read.
    """
    from hourllava.memory import Repository
    from hourllava.model import FrameWriter, watch_sharded

    began = time.perf_counter()
    if is_memory_file(source):
        raise MemoryFileError(source, "processes cannot share it", "name a video or REPOSITORY/NAME, or ask it alone")
    if is_kept(source):
        memory = Repository(source.parent).open_sharded(source.name, FrameWriter(model))
        return memory, {"load": time.perf_counter() - began}
    memory = watch_sharded(model, source, progress=progress and not dist.get_rank())
    return memory, {word: memory.timings[stage] for stage, word in STAGES.items()}
