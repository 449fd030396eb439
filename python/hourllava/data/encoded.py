# SPDX-License-Identifier: Apache-2.0
"""Features of videos that were encoded before: memories of a repository, and the original's .pt files (SPEC C.3)."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from hourllava.errors import DataError
from hourllava.memory import Repository
from hourllava.model.configuration import HourLlavaConfig

from .original import check_frames, read_original_features

_EMBED = "make them with this model's tower: hourllava embed"


def read_features(path: Path, config: HourLlavaConfig, tower: str | None) -> tuple[Tensor, float]:
    """Features (T, N, Cv) of a video, one frame a second, and the seconds that it lasts.

    Args:
        path: a video's folder in a repository, whose features come as exact as they are kept: bfloat16, or float32 of
            int8; or a .pt file of the original's, of which nothing but tensors and numbers is unpickled.
        tower: fingerprint that a repository's features must have; None takes those of any tower of the right sizes.

    Raises:
        DataError: there are none, or another tower made them.
        MemoryFileError: a repository's are damaged, or it has no such video.
    """
    features, seconds = read_original_features(path) if path.suffix == ".pt" else _read_memory(path, tower)
    check_frames(path, features, config.video_grid**2, config.vision_width)
    return features, seconds


def first_tower(paths: Iterable[Path]) -> str | None:
    """Fingerprint of the tower that made the first video there is in the repositories of `paths`; None without any."""
    for folder in dict.fromkeys(path.parent for path in paths if path.suffix != ".pt"):
        if Repository.is_at(folder):
            for video in Repository(folder).videos():
                return video.tower
    return None


def _read_memory(path: Path, tower: str | None) -> tuple[Tensor, float]:
    if not Repository.is_at(path.parent):
        raise DataError(path, "there is no repository of memories", "make one: hourllava embed")
    repository = Repository(path.parent)
    video = repository.catalogue.video(path.name)
    if tower is not None and video.tower != tower:
        raise DataError(path, "another tower made these features", _EMBED)
    if not video.frames:
        raise DataError(path, "not one frame of it is there", "let hourllava embed finish it")
    dtype = torch.bfloat16 if video.precision == "bfloat16" else torch.float32
    features = torch.empty(video.frames, video.per_frame, video.feature_width, dtype=dtype)
    for segment in repository.catalogue.segments(path.name):
        if segment.first + segment.frames <= video.frames:  # what was appended since is for the next time
            features[segment.first : segment.first + segment.frames] = repository.features(video, segment)
    return features, float(video.frames)
