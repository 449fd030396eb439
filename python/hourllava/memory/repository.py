# SPDX-License-Identifier: Apache-2.0
"""A repository of memories: a directory with a catalogue, which holds many videos and loses nothing it has committed.

Each video has a folder of its own. Features, from which everything else can be made again, stand in segments that are
written once and never changed; ready pages, if they are kept, in files that are mapped. What the catalogue says of them
is true: a chunk counts from the moment its transaction is through, and files hold no less than the catalogue says.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO

import torch
from torch import Tensor

from hourllava.errors import MemoryFileError

from .catalogue import FILE, Catalogue, Segment, Video
from .segments import pack_features, read_segment, rounding_error, unpack_features, write_segment
from .storage import reason
from .video_memory import MemoryShape, MemoryWriter, VideoMemory

GIVE_MODEL = "name a model that has the same vision tower"


class Repository:
    """Memories of many videos in one directory.

    Any number of processes may read; one at a time appends to a video.

    Args:
        folder: the directory, made if it is not there.

    Raises:
        MemoryFileError: it cannot be made, or holds something else.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MemoryFileError(folder, f"it cannot be made ({reason(error)})", "choose another place") from error
        self.catalogue = Catalogue(self.folder)

    @staticmethod
    def is_at(folder: str | os.PathLike[str]) -> bool:
        """Whether a directory is a repository."""
        return (Path(folder) / FILE).is_file()

    def videos(self) -> list[Video]:
        """What is held, by name."""
        return self.catalogue.videos()

    def add(
        self, name: str, writer: MemoryWriter, precision: str = "bfloat16", pages: bool = False, source: str = ""
    ) -> VideoMemory:
        """A new, empty memory that keeps every append.

        Args:
            name: what the video is called here; its folder gets that name.
            writer: the model.
            precision: of the features that are kept, "bfloat16" or "int8" (with a scale per token).
            pages: keep ready pages, too: several times the room, and the memory reopens at once.
            source: absolute path of the video, or where else it comes from.

        Raises:
            MemoryFileError: there is a video of that name, the name cannot be a folder's, or the disk is full.
        """
        if not name or name != Path(name).name or name.startswith("."):
            raise MemoryFileError(
                name or "video", "that is no name for a folder", "choose a name without / or a dot first"
            )
        shape = writer.shape
        video = Video(
            name=name,
            source=source,
            model=writer.fingerprint(),
            tower=writer.tower_fingerprint(),
            precision=precision,
            pages=pages,
            feature_width=writer.feature_width,
            per_frame=shape.per_frame,
            width=shape.width,
            blocks=shape.blocks,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            dtype=str(shape.dtype).removeprefix("torch."),
            created=time.time(),
        )
        try:
            (self.folder / name).mkdir(exist_ok=True)  # a folder that no video has is left from an interruption
        except OSError as error:
            raise MemoryFileError(
                self.folder / name, f"it cannot be made ({reason(error)})", "free some space"
            ) from error
        self.catalogue.add(video)
        return self.open(name, writer)

    def open(self, name: str, writer: MemoryWriter | None = None, append: bool = True) -> VideoMemory:
        """A video's memory as committed now.

        Args:
            name: the video.
            writer: the model; needed to append, and to make pages where none are kept.
            append: whether to append to it; readers need no lock.

        Raises:
            MemoryFileError: there is no such video; it is damaged; another process appends to it; another model made
                it; or there are no pages and no model is given.
        """
        video = self.catalogue.video(name)
        if writer is not None and writer.tower_fingerprint() != video.tower:
            raise MemoryFileError(self.folder / name, "another vision tower made it", "use that model, or watch again")
        append = append and writer is not None
        journal = _Journal(self, video) if append else None
        video = self.catalogue.video(name)  # the lock is held now, so that no commit can come between
        ready = video.pages and (writer is None or writer.fingerprint() == video.model)
        if ready:
            memory = self._mapped(video, append)
        elif writer is None:
            raise MemoryFileError(self.folder / name, "no ready pages are kept of it", GIVE_MODEL)
        else:
            memory = self._rebuilt(video, writer, journal)
        memory.damage, memory.path = video.damage or None, str(self.folder / name)
        memory.source = video.source or None
        if writer is not None:
            memory.attach(writer)
        memory._journal = journal
        return memory

    def delete(self, name: str) -> None:
        """Forget a video; who has it open may read on.

        Raises:
            MemoryFileError: there is no such video, or another process appends to it.
        """
        self.catalogue.video(name)
        with locked(self.folder / name):
            self.catalogue.delete(name)
            shutil.rmtree(self.folder / name)

    def export(self, name: str, path: str | os.PathLike[str], writer: MemoryWriter | None = None) -> None:
        """Write a video's memory to one file, for `VideoMemory.load`.

        Raises:
            MemoryFileError: as for `open`, or the file cannot be written.
        """
        self.open(name, writer, append=False).save(path)

    def features(self, video: Video, segment: Segment) -> Tensor:
        """The features (n, N, Cv) float32 of a segment, every byte checked.

        Raises:
            MemoryFileError: the segment is missing or damaged.
        """
        return read_segment(self.folder / video.name / segment.file, segment)

    def _mapped(self, video: Video, append: bool) -> VideoMemory:
        """The memory whose ready pages are kept: a few maps, whatever its length."""
        folder = self.folder / video.name
        memory = VideoMemory(_shape(video), video.model, torch.device("cpu"), pool_files(folder, append), not append)
        if video.frames:
            memory.reserve(video.frames, exactly=not append)
        memory.frames = video.frames
        memory.refresh_summaries()
        return memory

    def _rebuilt(self, video: Video, writer: MemoryWriter, journal: "_Journal | None") -> VideoMemory:
        """The memory made again from its features; its pages are kept if the video's are and this is its model."""
        keep = journal is not None and video.pages and writer.fingerprint() == video.model
        files = pool_files(self.folder / video.name, True) if keep else None
        memory = VideoMemory(writer.shape, writer.fingerprint(), writer.device, files)
        memory.attach(writer)
        memory.reserve(video.frames)
        for segment in self.catalogue.segments(video.name):
            memory.append_features(self.features(video, segment))
        return memory


class _Journal:
    """Appends to one video of a repository, alone as long as it lives."""

    def __init__(self, repository: Repository, video: Video) -> None:
        self._repository, self._video = repository, video
        self._lock = locked(repository.folder / video.name)
        self._packed: list[dict[str, Tensor]] = []  # since the last commit
        self._error = 0.0  # the worst of them

    def keep(self, features: Tensor) -> Tensor:
        packed = pack_features(features.cpu(), self._video.precision)
        kept = unpack_features(packed).to(features)
        self._error = max(self._error, rounding_error(features, kept))
        self._packed.append(packed)
        return kept

    def commit(self, first: int, memory: VideoMemory) -> None:
        packed = {name: torch.cat([part[name] for part in self._packed]) for name in self._packed[0]}
        folder = self._repository.folder / self._video.name
        segment = write_segment(folder, self._video, first, packed, self._error)
        if self._video.pages:
            segment.rows_sha256 = memory.row_digest(first, first + segment.frames)
        self._repository.catalogue.commit(self._video.name, segment, memory.damage or "")
        self.abandon()

    def close(self) -> None:
        self._lock.close()

    def abandon(self) -> None:
        self._packed, self._error = [], 0.0


def locked(folder: Path) -> IO[str]:
    """An open file that keeps other writers away from a video until it is closed or its process ends.

    Raises:
        MemoryFileError: another process writes there, or nothing can be written there.
    """
    try:
        lock = (folder / "lock").open("w")
    except OSError as error:
        why = f"it cannot be written to ({reason(error)})"
        raise MemoryFileError(folder, why, "choose another place, or only read") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise MemoryFileError(folder, "another process appends to it", "wait for that, or only read") from error
    return lock


def _shape(video: Video) -> MemoryShape:
    dtype = getattr(torch, video.dtype)
    return MemoryShape(video.per_frame, video.width, video.blocks, video.kv_heads, video.head_dim, dtype)


def pool_files(folder: Path, append: bool) -> Callable[[str], BinaryIO]:
    """Opens the files of a video's ready pages by the names that its memory gives them."""

    def open_pool(name: str) -> BinaryIO:
        path = folder / f"{name}.pool"
        try:
            if append and not path.exists():
                path.touch()
            return path.open("r+b" if append else "rb")  # type: ignore[return-value]
        except OSError as error:
            raise MemoryFileError(
                path, f"it cannot be opened ({reason(error)})", "run `hourllava memory repair`"
            ) from error

    return open_pool
