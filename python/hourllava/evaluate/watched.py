# SPDX-License-Identifier: Apache-2.0
"""Videos in a repository, each watched once by a vision tower, whatever asks about it."""

import os
from collections.abc import Callable
from pathlib import Path

from hourllava.data.embedding import Job, take_in
from hourllava.data.samples import memory_name
from hourllava.errors import MemoryFileError, VideoError
from hourllava.memory import Repository, VideoMemory
from hourllava.memory.catalogue import Source
from hourllava.model import FrameWriter, HourLlavaForConditionalGeneration

PRECISION = "bfloat16"


class WatchedVideos:
    """Memories of videos, watched when they are first asked for; what another run has watched is not watched again.

    Features are kept in bfloat16, under the tower's fingerprint, so that models with other towers share the folder.
    What `hourllava embed` has put there so counts, too.

    Args:
        model: the model.
        folder: the repository, made if it is not there.

    Raises:
        MemoryFileError: it cannot be made, or holds something else.
    """

    def __init__(self, model: HourLlavaForConditionalGeneration, folder: str | os.PathLike[str]) -> None:
        self._writer, self._size = FrameWriter(model), model.config.vision_config.image_size
        self.repository = Repository(folder)

    def memory(self, video: Path, name: str, on_frames: Callable[[int], None] = lambda count: None) -> VideoMemory:
        """The memory of a video file, for asking; an interrupted watching goes on where it stopped.

        Args:
            video: the file.
            name: what to call it; the tower's fingerprint is added.
            on_frames: called with the number of seconds after each few that are watched now.

        Raises:
            VideoError: the video cannot be read, or its memory not; or another process watches it just now.
            MemoryFileError: the repository cannot be written.
        """
        catalogue, tower = self.repository.catalogue, self._writer.tower_fingerprint()
        path = os.path.realpath(video)
        known = catalogue.source(path)
        held = catalogue.find(known.video) if known is not None and known.done else None
        if held is not None and held.tower == tower and held.precision == PRECISION:
            name = held.name
        else:
            name = memory_name(f"{name}-{tower[:12]}")
            if known is not None and known.video != name:
                # How far another tower has come says nothing of this one.
                catalogue.record(Source(path, name, False, ""))
            outcome = take_in(Job(name, path, (name,)), self.repository, self._writer, self._size, PRECISION, on_frames)
            if outcome.state in ("failed", "busy"):
                raise VideoError(video, _reason(outcome.reason, path), "download it again, or run the same again later")
        try:
            return self.repository.open(name, self._writer, append=False)
        except MemoryFileError as error:
            why = f"its memory, {self.repository.folder / name}, cannot be read ({error.why})"
            raise VideoError(video, why, "run `hourllava memory repair`, and the same again") from error


def _reason(reason: str, path: str) -> str:
    return reason.removeprefix(f"{path}: ").partition("; ")[0] or "another process watches it just now"
