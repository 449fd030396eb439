# SPDX-License-Identifier: Apache-2.0
"""Features of videos that were encoded before: memories of a repository, and the original's .pt files (SPEC C.3)."""

import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from hourllava.errors import DataError
from hourllava.memory import Repository
from hourllava.model.configuration import HourLlavaConfig
from hourllava.model.forgetting import spread_frames

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
    features, seconds = _read_pt(path) if path.suffix == ".pt" else _read_memory(path, tower)
    tokens, width = features.shape[1:]
    if width != config.vision_width or tokens != config.video_grid**2:
        why = f"another tower made these features: {tokens} tokens of {width} channels a frame"
        wanted = f"{config.video_grid**2} of {config.vision_width}"
        raise DataError(path, why, f"the model's makes {wanted}; {_EMBED}")
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


def _read_pt(path: Path) -> tuple[Tensor, float]:
    """The original's file holds repeated frames of videos under 128 s; as it does itself, that is undone."""
    todo = 'give {"vid_feat": (T, 64, 1152), "duration": seconds}, or leave it out'
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        features, seconds = held["vid_feat"], float(held["duration"])
    except OSError as error:
        raise DataError(path, f"it cannot be read ({error.strerror or error})", "check the path") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise DataError(path, f"it holds no features that are safe to read ({type(error).__name__})", todo) from error
    if not isinstance(features, Tensor) or features.dim() not in (3, 4) or 0 in features.shape or not seconds >= 0:
        raise DataError(path, "its vid_feat holds no frames, or its duration is no number of seconds", todo)
    features = features.flatten(1, 2) if features.dim() == 4 else features
    count = min(len(features), max(1, int(min(seconds, len(features)))))
    chosen = features[spread_frames(len(features), count)]
    if not bool(chosen.isfinite().all()):
        raise DataError(path, "it holds values that are no numbers (NaN or infinity)", todo)
    return chosen, seconds
