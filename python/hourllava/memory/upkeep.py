# SPDX-License-Identifier: Apache-2.0
"""Checking every byte of a repository, and making the best of one that was damaged."""

from dataclasses import dataclass
from pathlib import Path

from hourllava.errors import MemoryFileError

from .catalogue import Segment, Video
from .repository import Repository, locked


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a video."""

    video: str
    what: str  # in one line
    first: int | None = None  # the frame from which on features are lost, if they are


def verify(repository: Repository, name: str) -> list[Problem]:
    """Read all that is kept of a video and compare it with its checksums; an empty list means that it is sound.

    Files that nobody has committed are no problem: the next writer overwrites them.

    Raises:
        MemoryFileError: there is no such video, or the catalogue cannot be read.
    """
    video = repository.catalogue.video(name)
    problems, end = [], 0
    for segment in repository.catalogue.segments(name):
        if segment.first != end:
            problems.append(Problem(name, f"frames {end} to {segment.first} are missing", end))
        end = segment.first + segment.frames
        try:
            repository.packed(video, segment)
        except MemoryFileError as error:
            # Else a writer has just checked it and put its frames into a longer one.
            if segment in repository.catalogue.segments(name):
                problems.append(Problem(name, f"{error.what}: {error.why}", segment.first))
    if end != video.frames:
        problems.append(Problem(name, f"the catalogue says {video.frames} frames, its segments hold {end}", end))
    return problems + (_verify_pages(repository, video) if video.pages else [])


def _verify_pages(repository: Repository, video: Video) -> list[Problem]:
    try:
        memory = repository.open(video.name)
    except MemoryFileError as error:
        return [Problem(video.name, f"{error.what}: {error.why}")]
    damaged = [s for s in repository.catalogue.segments(video.name) if s.first + s.frames <= memory.frames]
    damaged = [s for s in damaged if memory.row_digest(s.first, s.first + s.frames) != s.rows_sha256]
    return [Problem(video.name, f"the ready pages of frames {s.first} to {s.first + s.frames} differ") for s in damaged]


def repair(repository: Repository, name: str) -> list[str]:
    """Cut a video off before the first damaged segment, give up damaged pages, and remove what nobody has committed.

    Pages that were given up are made again from the features whenever the video is opened with a model.

    Returns:
        what was done, a line each; empty if there was nothing to do.

    Raises:
        MemoryFileError: there is no such video, or another process appends to it.
    """
    video = repository.catalogue.video(name)
    with locked(repository.folder / name):
        problems = verify(repository, name)
        lost = [problem.first for problem in problems if problem.first is not None]
        frames = min(lost, default=video.frames)
        pages = video.pages and not any(problem.first is None for problem in problems)
        done = []
        if frames < video.frames:
            done.append(
                f"{name}: {video.frames - frames} s from {frames} s on are lost, watch the video again for them"
            )
        if video.pages and not pages:
            done.append(f"{name}: its ready pages were damaged and are gone, its features are there")
        if done:
            repository.catalogue.cut(name, frames, pages)
        return done + _remove_leftovers(repository.folder / name, repository.catalogue.segments(name), pages)


def _remove_leftovers(folder: Path, segments: list[Segment], pages: bool) -> list[str]:
    wanted = {segment.file for segment in segments} | {"lock"}
    leftovers = [p for p in folder.iterdir() if p.name not in wanted and not (pages and p.suffix == ".pool")]
    for path in leftovers:
        path.unlink()
    return [f"{path}: removed, nothing needs it" for path in sorted(leftovers)]
