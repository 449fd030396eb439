# SPDX-License-Identifier: Apache-2.0
"""One video's way into its memory, as threads see it: those that wait for it, and the one that takes it in."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hourllava.errors import HourLlavaError, InputError, MemoryFileError
from hourllava.memory import VideoMemory

from .files import PartialFile, Stop
from .sources import Source

State = Literal["waiting", "watching", "following", "ready", "stopped", "failed"]
OVER: tuple[State, ...] = ("ready", "stopped", "failed")
logger = logging.getLogger("hourllava.serve")


@dataclass(frozen=True)
class Status:
    """How far a video is.

    Attributes:
        name: of its memory.
        source: where it comes from, without passwords.
        state: "waiting" for its turn or for the file; "watching" a file; "following" what goes on; "ready", all of it;
            "stopped" before its end; or "failed" before its end.
        frames: seconds that can be asked.
        expected: how many they will be, where that is known.
        damage: one line on what of it could not be read.
        error: one line on why it failed.
        created: seconds since 1970.
    """

    name: str
    source: str
    state: State
    frames: int
    expected: int | None
    damage: str | None
    error: str | None
    created: float


class Job:
    """The taking in of one video.

    Attributes:
        name: of its memory.
        source: where it comes from, as the repository calls it.
        asked: what a client named, as long as it may have to be fetched.
        endless: it is followed or sent: nobody waits for its end.
        memory: what it is taken into, once it has begun.
        stop: ends it at the next chunk.
        on_stop: ends it where no thread of the server takes it in.
        by_hand: it was someone's wish that it stop, and not the end of the server.
        empty: it ended without one second, and is not kept.
    """

    def __init__(self, name: str, source: str, asked: Source | None = None, endless: bool = False) -> None:
        self.name, self.source, self.asked, self.endless = name, source, asked, endless
        self.memory: VideoMemory | None = None
        self.stop, self.by_hand, self.empty = Stop(), False, False
        self.on_stop: Callable[[], None] | None = None
        self.expected: int | None = None
        self.error: Exception | None = None
        self.created = time.time()
        self._state: State = "following" if endless else "waiting"
        self._frames, self._taken = 0, False
        self._changed = threading.Condition()

    @property
    def state(self) -> State:
        """As in :class:`Status`."""
        return self._state

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self._state in OVER

    def take(self) -> bool:
        """Make it this thread's to end; False if another has it, or it is over."""
        with self._changed:
            free, self._taken = not (self._taken or self.over), True
            return free

    def give_back(self) -> None:
        """Let another thread take it."""
        self._taken = False

    def change(self, state: State, error: Exception | None = None) -> None:
        """Go over to a state, and tell who waits."""
        with self._changed:
            self.error = error and _bare(error)
            self._state = state
            if self.over:
                self.memory = self.asked = self.on_stop = None  # much RAM, with a data: URL
            self._changed.notify_all()

    def progress(self, memory: VideoMemory) -> None:
        """Say that seconds were committed."""
        with self._changed:
            self._frames = memory.frames
            self._changed.notify_all()

    def wait(self, timeout: float | None) -> bool:
        """Wait until it is over or, if it is endless, can be asked; False if that took longer than `timeout` seconds.

        Raises:
            Exception: what it failed with, unless it is endless and can be asked.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: self.over or self._can_be_asked(), timeout)
        if done and self.error is not None and not self._can_be_asked():
            raise self.error.with_traceback(None)
        return done

    def wait_over(self) -> None:
        """Wait until nothing more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self.over)

    def error_line(self) -> str | None:
        """Why it failed, for people."""
        if self.error is None:
            return None
        if isinstance(self.error, HourLlavaError):
            return str(self.error)
        return f"{self.name}: an error of the server, which its log holds ({type(self.error).__name__})"

    def _can_be_asked(self) -> bool:
        return self.endless and self._frames > 0


def _bare(error: Exception) -> Exception:
    """An error to be kept: without the frames of the calls, which hold pictures and open files."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


class Upload:
    """The file of a video as it comes in; `Library.upload` makes it. One thread at a time uses it."""

    def __init__(self, file: PartialFile, watch: Callable[[], None]) -> None:
        self._file, self._watch = file, watch

    def write(self, data: bytes | memoryview) -> None:
        """Add bytes.

        Raises:
            SourceSizeError: they are too many.
            StorageError: the disk is full. After either nothing is left of the upload.
        """
        self._file.write(data)

    def commit(self) -> None:
        """The file is whole: it is watched when its turn comes.

        Raises:
            SourceError: it holds nothing.
            StorageError: the disk is full.
            SourceConflictError: meanwhile another video has got the name.
            BusyError: too many videos wait to be watched.
        """
        try:
            self._watch()
        finally:
            self._file.abort()  # what has been committed stays

    def abort(self) -> None:
        """Leave nothing of it, unless it has been committed."""
        self._file.abort()


class LiveMemory:
    """A memory to which a client sends the frames; `Library.live` makes it. Any thread may stop it."""

    def __init__(self, job: Job, memory: VideoMemory, end: Callable[[Job, State, Exception | None], None]) -> None:
        self.job, self._memory, self._end = job, memory, end
        self._lock = threading.Lock()  # held while seconds are taken in

    def append(self, frames: Tensor) -> int:
        """Take in the next seconds; when it returns, they can be asked.

        Args:
            frames: uint8 RGB (n, 3, H, W), one a second.

        Returns:
            how many seconds there are now.

        Raises:
            InputError: they are no such frames.
            MemoryFileError: it has been stopped or closed.
            StorageError: the disk is full, which ends it.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
            why = f"they are {tuple(frames.shape)} of {str(frames.dtype).removeprefix('torch.')}"
            raise InputError("frames", why, "give uint8 (n, 3, H, W), at least one")
        with self._lock:
            if self.job.over:
                raise MemoryFileError(self.job.name, "it was closed, or stopped", "open it again to go on with it")
            try:
                self._memory.append(frames)
            except Exception as error:
                self._end(self.job, "failed", error)
                raise
            self.job.progress(self._memory)
            return self._memory.frames

    def close(self) -> None:
        """Nothing more comes; what was taken in stays."""
        self.end("ready")

    def end(self, state: State) -> None:
        """Close it as "ready" or "stopped", once no seconds are being taken in."""
        with self._lock:
            if not self.job.over:
                self._end(self.job, state, None)
