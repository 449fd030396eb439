# SPDX-License-Identifier: Apache-2.0
"""A data set's videos into a repository of memories: which ones, under which names, and one after the other."""

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hourllava.errors import DataError, HourLlavaError, MemoryBusyError, VideoError
from hourllava.memory import Embedding, MemoryWriter, Repository, link
from hourllava.memory.catalogue import Source, Video

from .mixture import load_mixture
from .original import check_frames, read_original_features
from .samples import Media, memory_name

VIDEO_SUFFIXES = {
    ".3gp",
    ".avi",
    ".flv",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".ogv",
    ".ts",
    ".webm",
    ".wmv",
}
FEATURE_SUFFIXES = {".pt"}
CHUNK = 64  # frames decoded, and features read, at a time


@dataclass(frozen=True)
class Job:
    """A video that is to be in a repository."""

    id: str  # of the first sample that names it
    path: str  # absolute, links resolved
    names: tuple[str, ...]  # what it is called in the repository: all that samples call it
    fps: float = 1.0  # frames a second of a folder of frames


@dataclass(frozen=True)
class Outcome:
    """What became of a job."""

    job: Job
    state: Literal["done", "held", "busy", "failed"]  # held: was there before; busy: another process is at it
    frames: int = 0  # taken in just now
    reason: str = ""  # why it failed, or what of a video that is done could not be read


def list_jobs(manifest: Path, imported: bool = False) -> list[Job]:
    """The videos that a manifest names, each once, under the names by which training looks for them.

    Args:
        manifest: a folder of videos, a text file with a path on each line, or what `load_mixture` reads.
        imported: list the original's feature files instead of videos.

    Raises:
        HourLlavaError: there is no such manifest, it is not one, or names no video.
    """
    jobs: dict[str, Job] = {}
    for id, path, name, fps in _named(manifest, imported):
        path = os.path.realpath(path)
        job = jobs.setdefault(path, Job(id, path, (name,), fps))
        if name not in job.names:
            jobs[path] = replace(job, names=(*job.names, name))
    if not jobs:
        raise HourLlavaError(
            manifest, f"it names no {'.pt file' if imported else 'video'}", "check that it is the right one"
        )
    return list(jobs.values())


def _named(manifest: Path, imported: bool) -> Iterator[tuple[str, str, str, float]]:
    """The id, path, name and frames a second of every mention of a video."""
    if not manifest.exists():
        raise HourLlavaError(manifest, "there is no such file", "name a manifest, a list or a folder of videos")
    if not manifest.is_dir() and manifest.suffix != ".txt":
        for sample in load_mixture(manifest, decode=not imported):
            for medium in sample.media:
                if medium.kind == ("features" if imported else "video"):
                    yield sample.id, str(medium.path), medium.name, medium.fps
        return
    if manifest.is_dir():
        suffixes, folder = (FEATURE_SUFFIXES if imported else VIDEO_SUFFIXES), manifest
        names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.suffix.lower() in suffixes]
    else:
        folder = manifest.parent
        lines = [line.strip() for line in _read_text(manifest).splitlines()]
        names = [line for line in lines if line and not line.startswith("#")]
    for name in names:
        # The original puts the features of a/film.mp4 into a/film.pt.
        yield name, str(folder / name), memory_name(str(Path(name).with_suffix(".mp4")) if imported else name), 1.0


def _read_text(path: Path) -> str:
    text = path.read_text(errors="replace")
    if "\0" in text:
        raise DataError(path, "it is no text", "give a list of videos, with a path on each line")
    return text


def take_in(
    job: Job,
    repository: Repository,
    writer: MemoryWriter,
    size: int | None,
    precision: str,
    on_frames: Callable[[int], None] = lambda count: None,
) -> Outcome:
    """Take one video into the repository, from where that was left; what was recorded as done is not looked at again.

    Args:
        job: the video.
        repository: where its features go.
        writer: the model.
        size: side of the pictures that the model takes; None for a feature file of the original.
        precision: "bfloat16" or "int8".
        on_frames: called with the number of frames after each few.

    Raises:
        MemoryFileError: the repository cannot be written; a fault of the video itself is an outcome and no error.
    """
    name, tower = job.names[0], writer.tower_fingerprint()
    if not _is_text(job.path):
        error = DataError(job.path, "the catalogue can hold only paths in UTF-8", "rename the file")
        return Outcome(job, "failed", reason=str(error))
    known, videos = repository.catalogue.source(job.path), [repository.catalogue.find(name) for name in job.names]
    if known is not None and known.done and all(video is not None and video.tower == tower for video in videos):
        return Outcome(job, "held")
    try:
        if any(len(os.fsencode(name)) > 255 for name in job.names):
            raise DataError(job.path, "its name is too long for a folder", "shorten its path")
        expected, chunks = _open(job, writer, size)
        for video in videos:
            if video is not None:
                _check_held(video, job.path, tower)
        if videos[0] is not None and videos[0].frames >= expected:
            outcome = Outcome(job, "held")
        else:
            if videos[0] is not None and videos[0].pages:
                raise DataError(job.path, "its ready pages are kept", "go on with `hourllava watch --into`")
            with Embedding(repository, name, writer, precision, job.path) as embedding:
                outcome = _append(job, embedding, chunks, on_frames)
        for other in job.names[1:]:
            link(repository, name, other)
    except MemoryBusyError:
        return Outcome(job, "busy")
    except (VideoError, DataError) as error:
        outcome = Outcome(job, "failed", reason=str(error))
        video = repository.catalogue.find(name)
        if video is not None and video.frames == 0:
            repository.delete(name)
    repository.catalogue.record(Source(job.path, name, outcome.state != "failed", outcome.reason))
    return outcome


def _is_text(path: str) -> bool:
    """Whether a path is UTF-8; what is none of it has come as surrogates."""
    return os.fsencode(path).decode(errors="replace") == path


# A few frames (n, 3, H, W) or, without a size, features (n, N, Cv); and what is known to be lost so far.
Chunks = Generator[tuple[Tensor, str]]


def _open(job: Job, writer: MemoryWriter, size: int | None) -> tuple[int, Chunks]:
    """How many seconds a video holds, and what it holds."""
    path = Path(job.path)
    if size is None:
        features, _ = read_original_features(path)
        check_frames(path, features, writer.shape.per_frame, writer.feature_width)
        return len(features), ((part, "") for part in features.split(CHUNK))
    reader = Media("video", path, fps=job.fps).open()
    chunks = ((chunk.frames, reader.report.message or "") for chunk in reader.chunks(size, CHUNK))
    return reader.frames_expected, chunks


def _check_held(video: Video, path: str, tower: str) -> None:
    """Raise DataError if what the repository holds under a file's name cannot be gone on with."""
    source = video.source
    if os.path.isabs(source) and os.path.exists(source) and os.path.realpath(source) != path:  # else it was moved
        why = f"the repository calls another video {video.name}, {source}"
        raise DataError(path, why, "choose another repository for this one")
    if video.tower != tower:
        why = f"another vision tower made what the repository holds of it, {video.name}"
        raise DataError(path, why, "use that model, or another repository")


def _append(job: Job, embedding: Embedding, chunks: Chunks, on_frames: Callable[[int], None]) -> Outcome:
    before, seen = embedding.frames, 0
    with closing(chunks):  # an error that is kept keeps the decoder, too, unless that is closed
        for chunk, damage in chunks:
            new = chunk[max(0, embedding.frames - seen) :]
            seen += len(chunk)
            embedding.damage = damage
            if not len(new):
                continue
            if new.dtype == torch.uint8:
                embedding.append(new)
            else:
                embedding.append_features(new)
            on_frames(len(new))
    embedding.commit()
    return Outcome(job, "done", embedding.frames - before, embedding.damage)
