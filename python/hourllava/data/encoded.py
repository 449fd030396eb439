# SPDX-License-Identifier: Apache-2.0
"""Features of videos that were encoded before: memories of a repository, and the original's .pt files."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hourllava.errors import DataError
from hourllava.memory import Repository, fill_features
from hourllava.model.configuration import HourLlavaConfig

from .original import check_frames, read_original_features
from .samples import Sample

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


def check_towers(samples: Sequence[Sample], tower: str | None) -> None:
    """Look up who made the features that samples name, in the catalogues of their repositories; no features are read.

    Args:
        samples: what is trained on.
        tower: fingerprint that all must have; None takes any.

    Raises:
        DataError: there is another; names the first sample that has it.
    """
    if tower is None:
        return
    makers: dict[Path, dict[str, str]] = {}
    for sample in samples:
        for medium in sample.media:
            folder = medium.path.parent
            if medium.kind != "features" or medium.path.suffix == ".pt":
                continue
            if folder not in makers:
                videos = Repository(folder).videos() if Repository.is_at(folder) else []
                makers[folder] = {video.name: video.tower for video in videos}
            try:
                check_tower(medium.path, makers[folder].get(medium.path.name, ""), tower)
            except DataError as error:
                raise DataError(sample.named, f"{error.what}: {error.why}", error.todo) from error


def check_tower(path: Path, maker: str, tower: str | None) -> None:
    """Raise DataError if features, where it is known who made them, are of another tower than they have to be."""
    if tower is not None and maker not in ("", tower):
        raise DataError(path, "another tower made these features", _EMBED)


def _read_memory(path: Path, tower: str | None) -> tuple[Tensor, float]:
    if not Repository.is_at(path.parent):
        raise DataError(path, "there is no repository of memories", "make one: hourllava embed")
    repository = Repository(path.parent)
    video = repository.catalogue.video(path.name)
    check_tower(path, video.tower, tower)
    if not video.frames:
        raise DataError(path, "not one frame of it is there", "let hourllava embed finish it")
    dtype = torch.bfloat16 if video.precision == "bfloat16" else torch.float32
    features = torch.empty(video.frames, video.per_frame, video.feature_width, dtype=dtype)
    at = 0
    for part in repository.parts(video):
        rows = features[at : at + len(part["features"])]
        fill_features(rows, part)
        at += len(rows)
    return features, float(video.frames)
