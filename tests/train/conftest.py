# SPDX-License-Identifier: Apache-2.0
"""What the training tests start from."""

from pathlib import Path

import pytest
from tiny_model import make_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small checkpoint."""
    folder = tmp_path_factory.mktemp("base")
    make_model(min_frames=1).save_pretrained(folder)
    return folder
