# SPDX-License-Identifier: Apache-2.0
"""Files that are there once they are whole, and an event that ends the waiting for more of one."""

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import TracebackType

from hourllava.errors import SourceError, SourceSizeError, StorageError
from hourllava.memory import format_size

PARTIAL = ".part-"  # begins the names of what is not all there yet


class Stopped(Exception):  # noqa: N818 - no error: someone wanted it
    """What was going on has been stopped."""


class Stop(Event):
    """An event that also wakes whoever waits for a socket when it is set."""

    def __init__(self) -> None:
        super().__init__()
        self._sockets: list[socket.socket] = []

    def set(self) -> None:
        super().set()
        for waiting in self._sockets.copy():
            with contextlib.suppress(OSError):
                # Not `SSLSocket.shutdown`, which takes the session away from the thread that reads.
                socket.socket.shutdown(waiting, socket.SHUT_RDWR)

    @contextlib.contextmanager
    def waking(self, waiting: socket.socket) -> Iterator[None]:
        """Shut the socket down when the event is set meanwhile, or is set already."""
        self._sockets.append(waiting)
        try:
            if self.is_set():
                raise Stopped
            yield
        finally:
            self._sockets.remove(waiting)


class PartialFile:
    """A file that is there under its name only once all of it has been written.

    Args:
        path: its name in the end.
        limit: most bytes.
        what: how to call it in errors.

    Raises:
        StorageError: it cannot be made.
    """

    def __init__(self, path: Path, limit: int, what: str) -> None:
        self.path, self.size = path, 0
        self._limit, self._what = limit, what
        with self._told():
            number, name = tempfile.mkstemp(prefix=PARTIAL, dir=path.parent)
            self._file, self._partial = os.fdopen(number, "wb"), Path(name)

    def write(self, data: bytes | memoryview) -> None:
        """Add bytes.

        Raises:
            SourceSizeError: they are too many.
            StorageError: the disk is full. After either nothing is left of it.
        """
        self.size += len(data)
        if self.size > self._limit:
            self.abort()
            raise too_large(self._what, None, self._limit)
        with self._told():
            self._file.write(data)

    def commit(self) -> None:
        """Give it its name.

        Raises:
            SourceError: it holds nothing.
            StorageError: the disk is full.
        """
        if not self.size:
            self.abort()
            raise SourceError(self._what, "it is empty (0 bytes)", "send the video")
        with self._told():
            self._file.close()
            os.replace(self._partial, self.path)

    def abort(self) -> None:
        """Leave nothing of it, unless it has been committed."""
        with contextlib.suppress(OSError):  # what could not be flushed
            self._file.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abort()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if hasattr(self, "_partial"):
                self.abort()
            raise unwritable(self._what, error) from error


def unwritable(what: str, error: OSError) -> StorageError:
    """The error of what the disk does not take."""
    return StorageError(what, f"it cannot be written to the disk ({error.strerror})", "free some space on the server")


def too_large(what: str, size: int | None, limit: int) -> SourceSizeError:
    """The error of `size` bytes (None: not known how many) where `limit` are taken."""
    have = "more than that" if size is None else format_size(size)
    return SourceSizeError(what, f"it has {have}, and at most {format_size(limit)} are taken", "send a smaller video")
