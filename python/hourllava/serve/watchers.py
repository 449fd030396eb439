# SPDX-License-Identifier: Apache-2.0
"""The threads that take videos in: files one after the other, and each stream as it comes."""

import queue
from collections.abc import Callable
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING

from hourllava.errors import HourLlavaError, VideoError
from hourllava.memory import VideoMemory
from hourllava.video import FrameFolder, LiveReader, open_video

from .fetching import fetch
from .files import Stopped
from .jobs import Job, State, logger
from .shelf import Shelf
from .sources import SourcePolicy

if TYPE_CHECKING:
    from hourllava.model import HourLlavaForConditionalGeneration

FETCHERS = 2  # files that are being fetched, or wait to be watched


class Watchers:
    """Does what jobs say. Whatever goes wrong ends the job, and never a thread.

    Files are watched one at a time, in the order in which they came: decoding takes every core already.

    Args:
        model: watches.
        shelf: where memories are kept.
        policy: what may be fetched.
    """

    def __init__(self, model: "HourLlavaForConditionalGeneration", shelf: Shelf, policy: SourcePolicy) -> None:
        self._model, self._shelf, self._policy = model, shelf, policy
        self._to_fetch: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._to_watch: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._fetchers = [_started(self._work, self._to_fetch, self._fetch) for _ in range(FETCHERS)]
        self._watcher = _started(self._work, self._to_watch, self._watch)
        self._followers: list[Thread] = []

    def watch(self, job: Job) -> None:
        """Watch a file when its turn comes, after it has been fetched if it has to be."""
        here = self._shelf.film(job.name).exists() or (job.asked is not None and job.asked.kind == "file")
        (self._to_watch if here else self._to_fetch).put(job)

    def follow(self, job: Job, reader: LiveReader, memory: VideoMemory) -> None:
        """Take in what goes on, from now on."""
        job.take()
        self._followers = [thread for thread in self._followers if thread.is_alive()]
        self._followers.append(_started(self._guard, partial(self._follow, reader, memory), job))

    def stop(self, job: Job) -> None:
        """End a job at its next chunk, or at once if it waits for its turn."""
        job.stop.set()
        on_stop = job.on_stop
        if on_stop is not None:
            on_stop()
        elif job.take():
            self.end(job, "stopped")

    def end(self, job: Job, state: State, error: Exception | None = None) -> None:
        """Whatever happens: the memory is closed, the job is over, and who waits for it hears of it."""
        if isinstance(error, HourLlavaError):
            logger.warning("%s: %s", job.name, error)
            error = self._shelf.as_told(error)
        elif error is not None:
            logger.error("%s: watching failed", job.name, exc_info=error)
        try:
            self._shelf.end(job, state)
        except (HourLlavaError, OSError) as failure:
            logger.warning("%s: %s", job.name, failure)
            state, error = "failed", error or failure
        job.change(state, error)

    def close(self) -> None:
        """Wait for all threads; every job has been stopped."""
        for _ in self._fetchers:
            self._to_fetch.put(None)
        for thread in (*self._fetchers, *self._followers):
            thread.join()
        self._to_watch.put(None)
        self._watcher.join()

    def _work(self, jobs: "queue.SimpleQueue[Job | None]", do: Callable[[Job], None]) -> None:
        while (job := jobs.get()) is not None:
            if job.take():
                self._guard(do, job)
            del job  # or it would be there until the next one comes

    def _guard(self, do: Callable[[Job], None], job: Job) -> None:
        try:
            do(job)
        except Stopped:
            self.end(job, "stopped")
        except Exception as error:  # whatever it is, those that wait have to hear of it
            self.end(job, "failed", error)

    def _fetch(self, job: Job) -> None:
        assert job.asked is not None
        fetch(job.asked, self._policy, self._shelf.film(job.name), job.stop)
        job.give_back()
        if job.stop.is_set() and job.take():  # who stopped it may have looked a moment before
            raise Stopped
        self._to_watch.put(job)
        job.wait_over()  # no more than a few files lie there and wait

    def _watch(self, job: Job) -> None:
        job.change("watching")
        film = self._shelf.film(job.name)
        if not film.exists():
            assert job.asked is not None
            film = fetch(job.asked, self._policy, film, job.stop)
        reader = FrameFolder(film) if film.is_dir() else open_video(film, device=self._model.device)
        job.expected = reader.frames_expected
        memory = self._shelf.open(job)
        if memory.frames < job.expected:
            self._model.watch(reader, progress=False, on_chunk=partial(_on_chunk, job), into=memory)
        self.end(job, "ready")

    def _follow(self, reader: LiveReader, memory: VideoMemory, job: Job) -> None:
        try:
            self._model.watch(reader, progress=False, on_chunk=partial(_on_chunk, job), into=memory)
        except VideoError:
            if job.stop.is_set():
                raise Stopped from None
            raise
        if job.stop.is_set():
            raise Stopped
        if reader.broken:
            raise VideoError(reader.name, str(reader.ending), "what came is kept; follow it again to go on")
        self.end(job, "ready")


def _on_chunk(job: Job, memory: VideoMemory) -> None:
    job.progress(memory)
    if job.stop.is_set():
        raise Stopped


def _started(do: Callable[..., None], *given: object) -> Thread:
    thread = Thread(target=do, args=given, daemon=True)
    thread.start()
    return thread
