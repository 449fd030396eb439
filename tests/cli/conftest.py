# SPDX-License-Identifier: Apache-2.0
from fractions import Fraction
from pathlib import Path

import pytest
from clips import CLIP_SECONDS, write_clip
from tiny_model import make_model


def save_model(folder: Path, seed: int) -> str:
    """Write a model directory with random weights and return its path."""
    model = make_model(seed)
    model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A video of CLIP_SECONDS seconds."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    return str(write_clip(path, list(range(10 * CLIP_SECONDS)), Fraction(1, 10), options={"g": "20"}))
