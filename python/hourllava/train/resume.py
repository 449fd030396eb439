# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: whole or not there, found again, and written before a SIGTERM ends the run."""

import errno
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hourllava.errors import RecipeError
from hourllava.train.processes import over_all

PART = ".part"  # where checkpoints are while they are written
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def check_sharing(checkpoint: Path, parallel: str, saved: str, processes: int) -> None:
    """Whether so many processes that share the work by `parallel` can read a checkpoint's optimizer.

    Args:
        saved: how the processes shared that saved it.

    Raises:
        RecipeError: they cannot.
    """
    before = len(list(checkpoint.glob("rng_state*.pth")))  # each process has saved its own
    ways = ["ddp" if number == 1 else way for way, number in ((saved, before), (parallel, processes))]
    if ways[0] != ways[1] or (ways[0].startswith("zero") and before != processes):
        why = f"{before} processes with --parallel {saved} saved it, {processes} with {parallel} cannot read all of it"
        raise RecipeError(checkpoint, why, "go on as it was begun, or start in another folder")


def commit(part: Path, folder: Path, keep: int) -> None:
    """Give a checkpoint that is written its name, once all of it is on the disk, and remove all but the last `keep`."""
    for path in sorted(part.rglob("*")):
        if path.is_file():
            _flush(path)
    _flush(part)
    os.replace(part, folder / part.name)
    part.parent.rmdir()
    _flush(folder)
    for old in checkpoints(folder)[:-keep]:
        gone = folder / f".{old.name}.old"
        os.replace(old, gone)  # so that what is half removed is not taken for a checkpoint
        shutil.rmtree(gone)


def clear(folder: Path) -> None:
    """Remove what an interruption left behind of checkpoints that were being written or removed."""
    for path in (folder / PART, *folder.glob(".checkpoint-*.old")):
        shutil.rmtree(path, ignore_errors=True)


def failed_save(error: Exception, folder: Path, name: str) -> RecipeError:
    """What to tell of an error while a checkpoint was written."""
    number = error.errno if isinstance(error, OSError) else None
    message = " ".join(str(error).split())
    # safetensors tells the number in its words only.
    full = number in _FULL or any(f"os error {code})" in message for code in _FULL)
    why = "the disk is full" if full else f"it cannot be written ({message[:200]})"
    before = checkpoints(folder)
    rest = f"the same command goes on from {before[-1].name}" if before else "there is no earlier checkpoint"
    return RecipeError(folder / name, why, f"free some space; {rest}")


@contextmanager
def on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets meanwhile, instead of ending the process."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


class SaveBeforeEnd(TrainerCallback):
    """Once any process was asked to end, all save at the end of the same step and stop."""

    def __init__(self, asked: threading.Event) -> None:
        self.asked = asked
        self.stopped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if over_all(float(self.asked.is_set()), args.device, dist.ReduceOp.MAX) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self.stopped = True


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
