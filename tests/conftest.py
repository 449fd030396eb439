# SPDX-License-Identifier: Apache-2.0
import os
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") and not torch.cuda.is_available():
    # Triton asks when it is imported, which any test may do: without a GPU its kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)
