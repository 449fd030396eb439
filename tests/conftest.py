# SPDX-License-Identifier: Apache-2.0
import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") and not torch.cuda.is_available():
    # Triton asks when it is imported, which any test may do: without a GPU its kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vllm", metavar="URL", help="a vLLM server of the decoder of `tiny`, for serve/test_remote.py")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """On a GPU job nothing is skipped: what could not run has failed."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("FAIL_WITHOUT_CUDA"):
        report.outcome = "failed"


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)
