# SPDX-License-Identifier: Apache-2.0
"""The videos that a server knows: each is watched once, kept in a repository, and asked by any number of threads."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hourllava.errors import BusyError, HourLlavaError, InputError, MemoryFileError, SourceConflictError, SourceError
from hourllava.memory import HeldMemory, MemoryPool, TierUsage
from hourllava.memory.repository import check_name
from hourllava.model import FrameWriter
from hourllava.video import LiveReader

from .files import PartialFile
from .jobs import Job, LiveMemory, Status, Upload
from .shelf import Shelf, unknown
from .sources import Source, SourcePolicy, identify, identify_stream, same_source
from .watchers import Watchers

if TYPE_CHECKING:
    from hourllava.model import HourLlavaForConditionalGeneration

UPLOADED, SENT = "upload", "frames sent by a client"  # sources
FAILURES_TOLD = 64  # of videos that are not kept
MOST_WAITING = 256  # videos that wait to be watched


class Library:
    """Videos by name.

    A video that an earlier server left unfinished is gone on with as soon as someone asks for it. One that fails before
    its first second is forgotten; one that fails later can be asked with what is there, and is tried again, from
    there, when it is asked for next.

    Args:
        model: watches, and is asked.
        folder: the repository, made if it is not there.
        budget: bytes of pages on the model's device, such as "6GiB", taken at once.
        policy: where videos may come from.
        keep_videos: keep the files that were fetched or uploaded after they have been watched.

    Raises:
        ModelError: the model has no vision tower.
        MemoryFileError: the folder cannot be made, or holds something else.
        AdmissionError: the budget is smaller than a page, or the machine has not so much.
        InputError: the budget is no size.
    """

    def __init__(
        self,
        model: "HourLlavaForConditionalGeneration",
        folder: Path,
        budget: str | int,
        policy: SourcePolicy,
        keep_videos: bool = False,
    ) -> None:
        writer = FrameWriter(model)
        writer.tower_fingerprint()  # takes seconds once, and nobody is to wait for that later
        self._policy = policy
        self._shelf = Shelf(folder, writer, keep_videos)
        self._pool = MemoryPool(self._shelf.repository, writer, budget)
        self._watchers = Watchers(model, self._shelf, policy)
        self._lock = threading.Lock()  # held while it is decided who takes in what
        self._jobs: dict[str, Job] = {}  # the last one of each video
        self._closed = False

    def ensure(self, source: str | None, name: str | None) -> str:
        """The name of a video's memory, which begins to be made if need be; returns at once.

        Args:
            source: an http(s) or data: URL, a file: URL or an absolute path; None if the video is held.
            name: of the memory; None for one that is made of the source.

        Raises:
            SourceError: the source is of no known kind, or not allowed.
            SourceConflictError: the name stands for a video of another source.
            UnknownMemoryError: no source is given, and there is no such video.
            Exception: no source is given, and what the video failed with before its first second.
            MemoryFileError: the name is no name for a folder.
            StorageError: the disk is full.
            BusyError: too many videos wait to be watched.
        """
        if source is None and name is None:
            raise InputError("video", "neither a source nor a name is given", "give one of them")
        if name is not None:
            check_name(name)
        asked = None if source is None else identify(source, self._policy)
        if name is None:
            assert asked is not None
            name = asked.name()
        with self._lock:
            video = self._shelf.find(name)
            if video is None and asked is None:
                raise self._why_not(name)
            if video is not None and asked is not None and not same_source(video.source, asked):
                raise _conflict(name, "it stands for another video")
            job = self._jobs.get(name)
            if job is not None and not job.over:
                return name
            if video is not None and not self._shelf.unfinished(name):
                if job is not None and job.state == "failed" and not job.endless:
                    del self._jobs[name]  # another server has come to its end meanwhile
                return name
            if video is not None and asked is None:
                asked = self._source_again(video.source)
            if asked is not None or self._shelf.film(name).exists():
                recorded = video.source if video is not None else asked.record if asked is not None else ""
                self._begin(Job(name, recorded, asked))
        return name

    def upload(self, name: str) -> Upload:
        """A video whose file a client sends.

        Raises:
            SourceConflictError: there is a video of that name.
            MemoryFileError: the name is no name for a folder.
            StorageError: the disk is full.
        """
        self._check_free(name)
        file = PartialFile(self._shelf.film(name), self._policy.max_bytes, name)

        def watch() -> None:
            with self._lock:
                self._check_free(name)
                self._check_queue(name)
                file.commit()
                try:
                    self._begin(Job(name, UPLOADED))
                except BaseException:
                    self._shelf.film(name).unlink()  # of no video
                    raise

        return Upload(file, watch)

    def follow(self, url: str, name: str, idle: float) -> str:
        """Take in what goes on: a camera's stream, or a file that still grows; one that ended is gone on with.

        Args:
            url: the address of an allowed host, with any scheme that `LiveReader` knows, or of a file as for `ensure`.
                FFmpeg opens the address, and goes wherever that host sends it.
            name: of the memory.
            idle: seconds without data after which it has ended.

        Returns:
            the name.

        Raises:
            SourceError: the address is not allowed.
            SourceConflictError: the name stands for a video of another source.
            VideoError: the address is of no known kind, or there is no such file.
            MemoryFileError: the name is no name for a folder, the disk is full, or another process appends to it.
        """
        check_name(name)
        at, record = identify_stream(url, self._policy)
        with self._lock:
            self._check_source(name, record)
            if not self._running(name):
                job = Job(name, record, endless=True)
                reader = LiveReader(at, idle, job.stop)
                self._enter(job)
                self._watchers.follow(job, reader, self._shelf.open(job))
                self._jobs[name] = job
        return name

    def live(self, name: str) -> LiveMemory:
        """A memory for frames that a client sends; one that was closed is gone on with.

        Raises:
            SourceConflictError: the name stands for another video, or frames are being sent to it.
            MemoryFileError: the name is no name for a folder, the disk is full, or another process appends to it.
        """
        check_name(name)
        with self._lock:
            self._check_source(name, SENT)
            if self._running(name):
                raise _conflict(name, "someone sends frames to it")
            job = Job(name, SENT, endless=True)
            job.take()
            self._enter(job)
            live = LiveMemory(job, self._shelf.open(job), self._watchers.end)
            job.on_stop = partial(live.end, "stopped")
            self._jobs[name] = job
        return live

    def wait(self, name: str, timeout: float | None = None) -> bool:
        """Wait until a video that was begun is watched or, if it is followed or sent, has a second that can be asked.

        Returns:
            False if that took longer than `timeout` seconds.

        Raises:
            Exception: what the watching failed with.
            UnknownMemoryError: there is no such video.
        """
        job = self._jobs.get(name)
        if job is None:
            self._shelf.video(name)
            return True
        return job.wait(timeout)

    def use(self, name: str) -> AbstractContextManager[HeldMemory]:
        """The memory of a video as committed now, on the model's device until the block ends; see `MemoryPool.use`.

        Raises:
            UnknownMemoryError: there is no such video.
            MemoryFileError: it has no second yet, or is damaged.
            AdmissionError: its pages do not fit into the budget, or not as long as others are being asked.
        """
        self._shelf.video(name)
        return self._held(name)

    @contextmanager
    def _held(self, name: str) -> Iterator[HeldMemory]:
        with ExitStack() as stack:
            try:
                memory = stack.enter_context(self._pool.use(name))
            except MemoryFileError as error:
                self._shelf.video(name)  # it may have been deleted meanwhile: that is what is told then
                raise self._shelf.as_told(error) from error
            yield memory

    def status(self, name: str) -> Status:
        """How far a video is.

        Raises:
            UnknownMemoryError: there is no such video.
        """
        return self._shelf.status(name, self._jobs.get(name))

    def statuses(self) -> list[Status]:
        """How far each video is, by name; also of those that failed and are not kept."""
        return self._shelf.statuses(self._jobs.copy())

    def film(self, name: str) -> Path | None:
        """The file of a video, where there still is one that may be shown; None for frames.

        Raises:
            UnknownMemoryError: there is no such video.
        """
        source, kept = self._shelf.video(name).source, self._shelf.film(name)
        if kept.is_file():
            return kept
        try:
            path = self._policy.path(source) if source.startswith("/") else None
        except SourceError:
            return None
        return path if path is not None and path.is_file() else None

    def stop(self, name: str) -> None:
        """Take no more of a video in, once the chunk in hand is done; what is committed stays.

        Raises:
            UnknownMemoryError: there is no such video.
        """
        job = self._jobs.get(name)
        if job is None:
            self._shelf.video(name)
        elif not job.over:
            job.by_hand = True
            self._watchers.stop(job)

    def delete(self, name: str) -> None:
        """Stop a video and forget it, with its file if that was fetched or uploaded; who asks it may read on.

        Raises:
            UnknownMemoryError: there is no such video.
            MemoryBusyError: another process appends to it.
        """
        while True:
            job = self._jobs.get(name)
            if job is None:
                self._shelf.video(name)
            else:
                self._watchers.stop(job)
                job.wait_over()
            with self._lock:
                if self._jobs.get(name) is job:  # else someone has begun it anew
                    self._shelf.delete(name)
                    self._pool.forget(name)
                    self._jobs.pop(name, None)
                    return

    def usage(self) -> list[TierUsage]:
        """How full the budget is."""
        return self._pool.usage()

    def close(self) -> None:
        """Stop everything at the next chunk and wait for that; what is committed stays, and is gone on with later.

        A download ends at once, or after the policy's timeout where no connection has come about.
        """
        with self._lock:
            self._closed = True
            jobs = list(self._jobs.values())
        for job in jobs:
            self._watchers.stop(job)
        self._watchers.close()
        self._shelf.close()

    def _running(self, name: str) -> bool:
        job = self._jobs.get(name)
        return job is not None and not job.over

    def _begin(self, job: Job) -> None:
        """Have a file watched."""
        self._check_queue(job.name)
        self._enter(job)
        self._jobs[job.name] = job
        self._watchers.watch(job)

    def _check_queue(self, name: str) -> None:
        """Raise BusyError if no more videos may wait."""
        waiting = sum(job.state == "waiting" for job in self._jobs.values())
        if waiting >= MOST_WAITING:
            raise BusyError(name, f"{waiting} videos wait to be watched already", "try again later")

    def _enter(self, job: Job) -> None:
        if self._closed:
            raise HourLlavaError(job.name, "the server is shutting down", "ask again when it is back")
        gone = [name for name, other in self._jobs.items() if other.over and other.empty]
        for name in gone[: len(gone) - FAILURES_TOLD]:
            del self._jobs[name]
        self._shelf.begin(job)

    def _why_not(self, name: str) -> Exception:
        """Why there is no video of that name: it failed before its first second, or never was."""
        job = self._jobs.get(name)
        if job is not None and job.error is not None:
            return job.error.with_traceback(None)
        return unknown(name)

    def _source_again(self, recorded: str) -> Source | None:
        """The source of a video that was begun, if it can be had once more."""
        try:
            return identify(recorded, self._policy)
        except SourceError:
            return None

    def _check_source(self, name: str, record: str) -> None:
        video = self._shelf.find(name)
        if video is not None and video.source != record:
            raise _conflict(name, "it stands for another video")

    def _check_free(self, name: str) -> None:
        check_name(name)
        if self._running(name) or self._shelf.find(name) is not None:
            raise _conflict(name, "there is a video of that name")


def _conflict(name: str, why: str) -> SourceConflictError:
    return SourceConflictError(name, why, "choose another name, or delete it first")
