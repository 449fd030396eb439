# SPDX-License-Identifier: Apache-2.0
"""Features of videos that were encoded before: memories of a repository, and the original's .pt files (SPEC C.3)."""

import pickle
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
            int8; or a .pt file of the original's, never unpickled beyond tensors and numbers.
        tower: fingerprint that a repository's features must have; None takes those of any tower of the right width.

    Raises:
        DataError: there are none, or another tower made them.
        MemoryFileError: a repository's are damaged.
    """
    if path.suffix == ".pt":
        features, seconds = _read_pt(path)
    else:
        features, seconds = _read_memory(path, tower)
    tokens, width = features.shape[1:]
    if width != config.vision_width or tokens != config.video_grid**2:
        why = f"another tower made these features: {tokens} tokens of {width} channels a frame"
        wanted = f"{config.video_grid**2} of {config.vision_width}"
        raise DataError(path, why, f"the model's makes {wanted}; {_EMBED}")
    return features, seconds


def tower_of(path: Path) -> str | None:
    """Fingerprint of the tower that made a repository's video; None for a .pt file or where there is no such video."""
    if path.suffix == ".pt" or not Repository.is_at(path.parent):
        return None
    held = {video.name: video.tower for video in Repository(path.parent).videos()}
    return held.get(path.name)


def _read_memory(path: Path, tower: str | None) -> tuple[Tensor, float]:
    if not Repository.is_at(path.parent):
        raise DataError(path, "there is no repository of memories", "make one: hourllava embed")
    repository = Repository(path.parent)
    video = repository.catalogue.video(path.name)
    if tower is not None and video.tower != tower:
        raise DataError(path, "another tower made these features", _EMBED)
    dtype = torch.bfloat16 if video.precision == "bfloat16" else torch.float32
    segments = repository.catalogue.segments(path.name)
    if not segments:
        raise DataError(path, "no frame of it is there yet", "let hourllava embed finish it")
    features = torch.empty(video.frames, video.per_frame, video.feature_width, dtype=dtype)
    for segment in segments:
        features[segment.first : segment.first + segment.frames] = repository.features(video, segment)
    return features, float(video.frames)


def _read_pt(path: Path) -> tuple[Tensor, float]:
    """The original repeats frames of videos under 128 s; as it does itself, that is undone."""
    todo = "give a file with vid_feat (T, 64, 1152) and duration"
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        features, seconds = held["vid_feat"], float(held["duration"])
    except OSError as error:
        raise DataError(path, f"it cannot be read ({error.strerror or error})", "check the path") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise DataError(path, f"it holds no features ({type(error).__name__}: {why})", todo) from error
    if not isinstance(features, Tensor) or features.dim() not in (3, 4) or 0 in features.shape or not seconds >= 0:
        raise DataError(path, "its vid_feat is no tensor of frames", todo)
    features = features.flatten(1, 2) if features.dim() == 4 else features
    count = min(len(features), max(1, int(seconds)))
    return features[spread_frames(len(features), count)], seconds
