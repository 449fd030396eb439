# SPDX-License-Identifier: Apache-2.0
"""The original's feature files, a `.pt` each, read without running anything that they might hold."""

import math
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hourllava.errors import DataError
from hourllava.model.forgetting import spread_frames

_TODO = 'give {"vid_feat": (T, 64, 1152), "duration": seconds}, or leave it out'
_DAMAGE = (
    *(pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError),
    *(EOFError, OSError, zipfile.BadZipFile),
)
_PART = 64  # frames that are looked at together


def read_original_features(path: Path) -> tuple[Tensor, float]:
    """The features of a video that the original extracted, one frame a second, and the seconds that it lasts.

    Of a video under 128 s the file holds more frames than seconds; as many as there are seconds are taken, evenly
    spread, as the original does when it trains.

    Args:
        path: what `torch.save` made of `{"vid_feat": (T, N, Cv) or (T, g, g, Cv), "duration": seconds}`. It is mapped:
            only what is used is read.

    Returns:
        (min(T, duration), N, Cv) in the file's dtype, and the duration.

    Raises:
        DataError: the file is missing, damaged, not of that layout, holds more than tensors and numbers, or values that
            are no numbers.
    """
    features, seconds = _contents(path)
    sound = isinstance(features, Tensor) and features.layout == torch.strided and features.is_floating_point()
    if not sound or features.dim() not in (3, 4) or 0 in features.shape or not 0 <= seconds < math.inf:
        raise DataError(path, "its vid_feat holds no frames, or its duration is no number of seconds", _TODO)
    features = features.flatten(1, 2) if features.dim() == 4 else features
    if features.nbytes > os.path.getsize(path):
        raise DataError(path, "its vid_feat says that it holds more than the file does", _TODO)
    count = min(len(features), max(1, int(seconds)))
    features = features if count == len(features) else features[spread_frames(len(features), count)]
    # The least and the greatest are NaN where one number is; nothing is written to look at them.
    if not all(math.isfinite(bound) for part in features.split(_PART) for bound in part.aminmax()):
        raise DataError(path, "it holds values that are no numbers (NaN or infinity)", _TODO)
    return features, seconds


def check_frames(path: Path, features: Tensor, tokens: int, width: int) -> None:
    """Raise DataError unless features (T, N, Cv) are of a tower that gives `tokens` of `width` channels a frame."""
    if tuple(features.shape[1:]) != (tokens, width):
        why = f"another tower made these features: {features.shape[1]} tokens of {features.shape[2]} channels a frame"
        todo = f"the model's makes {tokens} of {width}; make them with this model's tower: hourllava embed"
        raise DataError(path, why, todo)


def _contents(path: Path) -> tuple[Any, float]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return held["vid_feat"], float(held["duration"])
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DataError(path, f"it cannot be read ({error.strerror})", "check the path") from error
    except _DAMAGE as error:
        raise DataError(path, f"it holds no features that are safe to read ({type(error).__name__})", _TODO) from error
