# SPDX-License-Identifier: Apache-2.0
"""What the training tests start from."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_model import make_model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """How a busy machine's threads share a sum is not what these tests are about: bits are compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small checkpoint."""
    folder = tmp_path_factory.mktemp("base")
    make_model(min_frames=1).save_pretrained(folder)
    return folder
