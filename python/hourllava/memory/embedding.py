# SPDX-License-Identifier: Apache-2.0
"""Features alone, in and out of a repository: what a data set needs of its videos."""

import os
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from hourllava.errors import MemoryFileError

from .pages import batches
from .repository import Repository, VideoJournal, check_name, locked
from .storage import reason
from .writer import MemoryWriter

COMMIT = 256  # frames; an hour is 15 files, and a writer that is killed loses four minutes at most


class Embedding:
    """Appends features to one video of a repository, as `VideoMemory.append` does, and makes no pages of them.

    It goes on where the video ends, and holds the video's lock until it is closed.

    Args:
        repository: where the video is, or will be.
        name: what it is called there.
        writer: the model.
        precision: "bfloat16" or "int8", for a video that is not there yet.
        source: absolute path of the video, or where else it comes from.

    Attributes:
        frames: seconds taken in, T.
        damage: one line on what of the video could not be read, or "".

    Raises:
        MemoryBusyError: another process appends to the video.
        MemoryFileError: another vision tower made it, pages are kept of it, which would miss what is added, the name
            cannot be a folder's, or nothing can be written.
    """

    def __init__(
        self, repository: Repository, name: str, writer: MemoryWriter, precision: str = "bfloat16", source: str = ""
    ) -> None:
        folder = _make_folder(repository, name)
        lock = locked(folder)  # before the catalogue is asked, so that two processes never begin one video
        try:
            video = repository.catalogue.find(name) or repository.declare(name, writer, precision, False, source)
            if video.tower != writer.tower_fingerprint():
                raise MemoryFileError(folder, "another vision tower made it", "use that model, or another repository")
            if video.pages:
                raise MemoryFileError(folder, "ready pages are kept of it", "go on with `hourllava watch --into`")
        except BaseException:
            lock.close()
            raise
        self.frames, self.damage = video.frames, video.damage
        self._writer = writer
        self._committed = video.frames
        self._journal = VideoJournal(repository, video, lock)

    def __enter__(self) -> "Embedding":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._journal.close()

    @torch.no_grad()
    def append(self, frames: Tensor) -> None:
        """Add the video's next seconds, (n, 3, H, W) uint8 RGB; every few minutes of them are committed.

        Raises:
            MemoryFileError: they cannot be written; what was committed stays.
        """
        writer, start = self._writer, self.frames
        for first, end, offset in batches(start, start + len(frames), writer.batch):
            whole = frames.new_zeros(writer.batch, *frames.shape[1:], device=writer.device)
            whole[offset : offset + end - first] = frames[first - start : end - start]
            self.append_features(writer.encode(whole)[offset : offset + end - first])

    def append_features(self, features: Tensor) -> None:
        """Add seconds whose features (n, N, Cv) are there already.

        Raises:
            MemoryFileError: they cannot be written; what was committed stays.
        """
        self._journal.keep(features)
        self.frames += len(features)
        if self.frames - self._committed >= COMMIT:
            self.commit()

    def commit(self) -> None:
        """Keep all that was appended; when it returns, that survives whatever happens.

        Raises:
            MemoryFileError: it cannot be written; what was committed before stays.
        """
        if self.frames > self._committed:
            self._journal.store(self._committed, self.damage)
            self._committed = self.frames


def link(repository: Repository, name: str, other: str) -> None:
    """Let a video be found under another name, too, unless there is one of that name; its features take no more room.

    Raises:
        MemoryBusyError: another process is at that name.
        MemoryFileError: there is no such video, or it cannot be written.
    """
    if repository.catalogue.find(other):
        return
    folder = _make_folder(repository, other)
    with locked(folder):
        segments = repository.catalogue.segments(name)
        for segment in segments:
            try:
                (folder / segment.file).unlink(missing_ok=True)
                os.link(repository.folder / name / segment.file, folder / segment.file)
            except OSError as error:
                why = f"its files cannot be linked ({reason(error)})"
                raise MemoryFileError(folder, why, "use a file system with hard links") from error
        repository.catalogue.add(replace(repository.catalogue.video(name), name=other, pages=False), segments)


def _make_folder(repository: Repository, name: str) -> Path:
    check_name(name)
    folder = repository.folder / name
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise MemoryFileError(
            folder, f"it cannot be made ({reason(error)})", "free some space, or name another folder"
        ) from error
    return folder


def packed_features(repository: Repository, name: str) -> dict[str, Tensor]:
    """All features of a video as they are kept, every byte checked.

    Returns:
        "features" (T, N, Cv) bfloat16 or int8, and for int8 "scales" (T, N) float32, which they are multiplied by.

    Raises:
        MemoryFileError: there is no such video, it holds no frame, or it is damaged.
    """
    parts = list(repository.parts(repository.catalogue.video(name)))
    if not parts:
        raise MemoryFileError(repository.folder / name, "it holds no frame", "watch the video first")
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
