# SPDX-License-Identifier: Apache-2.0
"""A repository of memories: a directory with a catalogue, which holds many videos and loses nothing it has committed.

Each video has a folder of its own. Features, from which everything else can be made again, stand in segments that are
written once and never changed; short ones are gathered into a longer one, which takes their place in one transaction.
Ready pages, if they are kept, stand in files that are mapped. What the catalogue says of them is true: a chunk counts
from the moment its transaction is through, and files hold no less than the catalogue says.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, BinaryIO

import torch
from torch import Tensor
from torch import distributed as dist

from hourllava.errors import MemoryBusyError, MemoryFileError, StorageError

from .catalogue import FILE, Catalogue, Segment, Video
from .segments import (
    GATHERED,
    REPAIR,
    pack_features,
    read_packed,
    rounding_error,
    to_gather,
    unpack_features,
    write_segment,
)
from .sharded_memory import ShardedMemory, found_group
from .storage import reason
from .video_memory import VideoMemory
from .writer import MemoryShape, MemoryWriter

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
            MemoryFileError: there is a video of that name, or the name cannot be a folder's.
            StorageError: the disk is full.
        """
        self.declare(name, writer, precision, pages, source)
        return self.open(name, writer)

    def declare(self, name: str, writer: MemoryWriter, precision: str, pages: bool, source: str) -> Video:
        """`add` without a memory: the video is in the catalogue, and has no frame.

        Raises:
            MemoryFileError, StorageError: as for `add`.
        """
        check_name(name)
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
            raise StorageError(
                self.folder / name, f"it cannot be made ({reason(error)})", "free some space, or name another folder"
            ) from error
        self.catalogue.add(video)
        return video

    def open(self, name: str, writer: MemoryWriter | None = None, append: bool = True) -> VideoMemory:
        """A video's memory as committed now.

        Args:
            name: the video.
            writer: the model; needed to append, and to make pages where none are kept.
            append: whether to append to it; readers need no lock.

        Raises:
            MemoryFileError: there is no such video; it is damaged; another process appends to it; another model made
                it, or its pages and it is to be appended to; or there are no pages and no model is given.
        """
        video = self.catalogue.video(name)
        if writer is not None:
            self.check_tower(video, writer)
        append = append and writer is not None
        if append and writer is not None and video.pages and writer.fingerprint() != video.model:
            todo = "use that model, or only read"
            raise MemoryFileError(self.folder / name, "another model made its ready pages", todo)
        journal = VideoJournal(self, video) if append else None
        video = self.catalogue.video(name)  # the lock is held now, so that no commit can come between
        ready = video.pages and (writer is None or writer.fingerprint() == video.model)
        if ready:
            memory = self._mapped(video, append)
        elif writer is None:
            raise MemoryFileError(self.folder / name, "no ready pages are kept of it", GIVE_MODEL)
        else:
            # Its pages are kept if the video's are and this is its model.
            keep = journal is not None and video.pages and writer.fingerprint() == video.model
            memory = self.rebuilt(video, writer, pool_files(self.folder / name, True) if keep else None)
        memory.damage, memory.path = video.damage or None, str(self.folder / name)
        memory.source = video.source or None
        if writer is not None:
            memory.attach(writer)
        memory._journal = journal
        return memory

    def open_sharded(self, name: str, writer: MemoryWriter, group: dist.ProcessGroup | None = None) -> ShardedMemory:
        """A video's memory as committed now, made of its features and spread over the ranks of a group.

        Every rank calls this, and reads the features from a file system that all see.

        Raises:
            MemoryFileError: there is no such video; it is damaged; or another vision tower made it.
            HourLlavaError: there is no group.
        """
        video = self.catalogue.video(name)
        self.check_tower(video, writer)
        found_group(group)
        agreed = torch.tensor(video.frames, device=writer.device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN, group)  # a writer may have come between two ranks
        memory = ShardedMemory(writer, group)
        memory.reserve(int(agreed))
        for part in self.parts(replace(video, frames=int(agreed))):
            memory.append_features(unpack_features(part))
        memory.damage, memory.path = video.damage or None, str(self.folder / name)
        memory.source = video.source or None
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

    def check_tower(self, video: Video, writer: MemoryWriter) -> None:
        """Raise MemoryFileError unless a model with this one's tower made the features."""
        if writer.tower_fingerprint() != video.tower:
            what = self.folder / video.name
            raise MemoryFileError(what, "another vision tower made it", "use that model, or watch again")

    def packed(self, video: Video, segment: Segment) -> dict[str, Tensor]:
        """What `pack_features` gave of a segment, every byte checked.

        Raises:
            MemoryFileError: the segment is missing or damaged.
        """
        return read_packed(self.folder / video.name / segment.file, segment)

    def parts(self, video: Video) -> Iterator[dict[str, Tensor]]:
        """What `pack_features` gave of all frames of a video, part by part, also while a writer gathers its segments.

        Raises:
            MemoryFileError: a segment is missing or damaged.
        """
        at = 0
        while at < video.frames:
            segments = [s for s in self.catalogue.segments(video.name) if s.first + s.frames > at]
            if not segments or segments[0].first > at:
                raise MemoryFileError(self.folder / video.name, f"its frames from {at} on are missing", REPAIR)
            for segment in segments:
                if segment.first > at or at == video.frames:
                    break
                try:
                    packed = self.packed(video, segment)
                except MemoryFileError:
                    if segment in self.catalogue.segments(video.name):
                        raise
                    break  # a longer one has taken its place
                rows = slice(at - segment.first, video.frames - segment.first)
                part = {kind: tensor[rows] for kind, tensor in packed.items()}
                at += len(part["features"])
                yield part

    def _mapped(self, video: Video, append: bool) -> VideoMemory:
        """The memory whose ready pages are kept: a few maps, whatever its length."""
        folder = self.folder / video.name
        # The first writer may not have made its files yet.
        files = pool_files(folder, append) if append or video.frames else None
        memory = VideoMemory(_shape(video), video.model, torch.device("cpu"), files, not append)
        if video.frames:
            memory.reserve(video.frames, exactly=not append)
        memory.frames = video.frames
        memory.refresh_summaries()
        return memory

    def rebuilt(
        self, video: Video, writer: MemoryWriter, files: Callable[[str], BinaryIO] | None = None
    ) -> VideoMemory:
        """The memory made again from its features: in files on the CPU, or in RAM on the model's device.

        Raises:
            MemoryFileError: the features are damaged, or the disk has no room for the files.
        """
        device = torch.device("cpu") if files else writer.device
        memory = VideoMemory(writer.shape, writer.fingerprint(), device, files)
        memory.attach(writer)
        memory.reserve(video.frames)
        for part in self.parts(video):
            memory.append_features(unpack_features(part))
        return memory


class VideoJournal:
    """Appends to one video of a repository, alone as long as it lives."""

    def __init__(self, repository: Repository, video: Video, lock: IO[str] | None = None) -> None:
        self._repository, self._video = repository, video
        self._lock = lock or locked(repository.folder / video.name)
        self._packed: list[dict[str, Tensor]] = []  # since the last commit
        self._error = 0.0  # the worst of them

    def keep(self, features: Tensor) -> Tensor:
        packed = pack_features(features.cpu(), self._video.precision)
        kept = unpack_features(packed).to(features)
        self._error = max(self._error, rounding_error(features, kept))
        self._packed.append(packed)
        return kept

    def commit(self, first: int, memory: VideoMemory) -> None:
        name, catalogue = self._video.name, self._repository.catalogue
        gathered = to_gather(catalogue.last_segments(name, GATHERED), memory.frames - first)
        first = gathered[0].first if gathered else first
        rows_sha256 = memory.row_digest(first, memory.frames) if self._video.pages else ""
        self._store(first, gathered, memory.damage or "", rows_sha256)

    def store(self, first: int, damage: str) -> None:
        """`commit` for whoever has no memory: what was taken in is of frames `first` on."""
        self._store(first, [], damage, "")

    def _store(self, first: int, gathered: list[Segment], damage: str, rows_sha256: str) -> None:
        """Write and count in what was taken in, behind the frames of `gathered`, which begin at `first`."""
        name, folder = self._video.name, self._repository.folder / self._video.name
        parts = [read_packed(folder / segment.file, segment) for segment in gathered] + self._packed
        packed = {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}
        error = max([self._error, *(segment.error for segment in gathered)])
        segment = write_segment(folder, self._video, first, packed, error)
        segment.rows_sha256 = rows_sha256
        self._repository.catalogue.commit(name, segment, damage)
        self.abandon()
        for old in gathered:
            with contextlib.suppress(OSError):  # a file that stays is no harm, `repair` removes it
                (folder / old.file).unlink()

    def close(self) -> None:
        self._lock.close()

    def abandon(self) -> None:
        self._packed, self._error = [], 0.0


def locked(folder: Path) -> IO[str]:
    """An open file that keeps other writers away from a video until it is closed or its process ends.

    Raises:
        MemoryBusyError: another process writes there.
        MemoryFileError: nothing can be written there.
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
        raise MemoryBusyError(folder, "another process appends to it", "wait for that, or only read") from error
    return lock


def check_name(name: str) -> None:
    """Raise MemoryFileError unless a folder can have this name."""
    if not name or name != Path(name).name or name.startswith(".") or len(os.fsencode(name)) > 255:
        why, todo = "that is no name for a folder", "choose a shorter name, without / or a dot first"
        raise MemoryFileError(name or "video", why, todo)


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
