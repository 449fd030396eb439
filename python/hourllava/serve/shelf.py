# SPDX-License-Identifier: Apache-2.0
"""What a server keeps in a repository's folder: memories, which of them are whole, and the files of videos."""

import fcntl
import shutil
from pathlib import Path

from hourllava.errors import HourLlavaError, UnknownMemoryError
from hourllava.memory import MemoryWriter, Repository, VideoMemory
from hourllava.memory.catalogue import Source as Mark
from hourllava.memory.catalogue import Video

from .files import PARTIAL
from .jobs import Job, State, Status

FILMS = ".videos"  # in the repository's folder; no video can have such a name
LOCK = ".lock"  # in there
STOPPED = "stopped"  # what the mark of a video says that is not whole and is not to be gone on with


class Shelf:
    """A repository, and for each video that a server takes in a mark that survives it.

    A video without a mark was taken in by someone else, and is left as it is.

    Args:
        folder: the repository.
        writer: the model.
        keep_videos: keep files that were fetched or uploaded after they have been watched.

    Raises:
        MemoryFileError: as for `Repository`.
    """

    def __init__(self, folder: Path, writer: MemoryWriter, keep_videos: bool) -> None:
        self.repository = Repository(folder)
        self._catalogue, self._writer, self._keep_videos = self.repository.catalogue, writer, keep_videos
        self._films = self.repository.folder / FILMS
        self._films.mkdir(exist_ok=True)
        self._lock = (self._films / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._tidy()
        except BlockingIOError:
            pass  # another server may be writing there
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def close(self) -> None:
        """Let another server tidy up."""
        self._lock.close()

    def film(self, name: str) -> Path:
        """Where the file of a video is that was fetched or uploaded, or the folder of its frames."""
        return self._films / name

    def without_place(self, text: str) -> str:
        """A text with names in place of paths: where the server keeps its files is nobody's business."""
        return text.replace(f"{self._films}/", "").replace(f"{self.repository.folder}/", "")

    def as_told(self, error: HourLlavaError) -> HourLlavaError:
        """The same error without paths of the server."""
        return type(error)(*map(self.without_place, (error.what, error.why, error.todo)))

    def find(self, name: str) -> Video | None:
        """The video of that name, if there is one."""
        return self._catalogue.find(name)

    def video(self, name: str) -> Video:
        """Raises UnknownMemoryError if there is none of that name."""
        video = self.find(name)
        if video is None:
            raise unknown(name)
        return video

    def unfinished(self, name: str) -> bool:
        """Whether a server began to watch a video and did not come to its end."""
        mark = self._catalogue.source(_key(name))
        return mark is not None and not mark.done

    def begin(self, job: Job) -> None:
        """Enter a video that is to be taken in, if it is not there yet.

        Raises:
            MemoryFileError: the disk is full.
        """
        # What is endless has nothing to be gone on with once nobody follows it.
        self._mark(job.name, job.endless, STOPPED if job.endless else "")
        if self.find(job.name) is None:
            if job.asked is not None or job.endless:
                _remove(self.film(job.name))  # of a video that another program has deleted
            self.repository.declare(job.name, self._writer, "bfloat16", True, job.source)

    def open(self, job: Job) -> VideoMemory:
        """The memory of a video that has been entered, to append to.

        Raises:
            MemoryFileError: it is damaged, or was made by another model.
            MemoryBusyError: another process appends to it.
        """
        job.memory = self.repository.open(job.name, self._writer)
        job.progress(job.memory)
        return job.memory

    def end(self, job: Job, state: State) -> None:
        """Close a memory, say how far it came, and remove what is no longer needed.

        Raises:
            MemoryFileError: the disk is full, or another process appends to it.
        """
        if job.memory is not None:
            job.memory.close()
        if state == "stopped" and not (job.by_hand or job.endless):
            return  # it is gone on with when the server is back
        video = self.find(job.name)
        job.empty = video is None or not video.frames
        if job.empty:
            self.delete(job.name)
        elif state != "failed":
            self._mark(job.name, True, STOPPED if state == "stopped" else "")
            if not self._keep_videos:
                _remove(self.film(job.name))

    def delete(self, name: str) -> None:
        """Forget a video, with its file.

        Raises:
            MemoryBusyError: another process appends to it.
        """
        if self.find(name) is not None:
            self.repository.delete(name)
        _remove(self.film(name))

    def status(self, name: str, job: Job | None) -> Status:
        """How far a video is, of which the last job is given.

        Raises:
            UnknownMemoryError: there is no such video.
        """
        video = self.find(name) if job is not None and (not job.over or job.empty) else self.video(name)
        return self._status(name, job, video, self._catalogue.source(_key(name)))

    def statuses(self, jobs: dict[str, Job]) -> list[Status]:
        """How far each video is, by name, of which the last jobs are given."""
        videos = {video.name: video for video in self._catalogue.videos()}
        marks = {mark.path: mark for mark in self._catalogue.sources()}
        names = sorted({*videos, *(name for name, job in jobs.items() if not job.over or job.empty)})
        return [self._status(n, jobs.get(n), videos.get(n), marks.get(_key(n))) for n in names]

    def _status(self, name: str, job: Job | None, video: Video | None, mark: Mark | None) -> Status:
        whole = mark is None or (mark.done and mark.reason != STOPPED)
        state: State = job.state if job is not None else "ready" if whole else "stopped"
        frames, damage = (video.frames, self.without_place(video.damage)) if video is not None else (0, "")
        return Status(
            name=name,
            source=job.source if job is not None else video.source if video is not None else "",
            state=state,
            frames=frames,
            expected=frames if state == "ready" else job.expected if job is not None else None,
            damage=damage or None,
            error=job.error_line() if job is not None else None,
            created=video.created if video is not None else job.created if job is not None else 0.0,
        )

    def _mark(self, name: str, done: bool, reason: str) -> None:
        self._catalogue.record(Mark(_key(name), name, done, reason))

    def _tidy(self) -> None:
        """Remove what an interruption left: files that are not whole, and those of no video."""
        known = {video.name for video in self._catalogue.videos()} | {LOCK}
        for path in self._films.iterdir():
            if path.name.startswith(PARTIAL) or path.name not in known:
                _remove(path)


def unknown(name: str) -> UnknownMemoryError:
    """The error of a name that no video has."""
    return UnknownMemoryError(name, "there is no such memory", "name its video, too, or upload it first")


def _key(name: str) -> str:
    """Stands for a file's path in the catalogue's list of how far each came; no absolute path begins so."""
    return f"serve:{name}"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
