# SPDX-License-Identifier: Apache-2.0
"""Manifests and media for the tests of training data."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
from clips import write_clip
from PIL import Image


def talk(*texts, **fields):
    """An entry whose messages come from human and gpt by turns."""
    messages = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {**fields, "conversations": messages}


def write_lines(path: Path, *entries) -> Path:
    path.write_text("".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries))
    return path


def write_image(path: Path, width=90, height=60, seed=0) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def write_video(path: Path, seconds=6) -> Path:
    """A picture a second, each showing its own number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_clip(path, range(seconds), Fraction(1))
