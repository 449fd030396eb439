# SPDX-License-Identifier: Apache-2.0
"""Where the GPU's kernels run: on a GPU if there is one, else the Triton ones on the CPU, in Triton's interpreter."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

HAS_TRITON = find_spec("triton") is not None
ON_GPU = torch.cuda.is_available()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """On a GPU job nothing is skipped: what could not run has failed."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("FAIL_WITHOUT_CUDA"):
        report.outcome = "failed"


@pytest.fixture(scope="module", params=["library", "triton"] if ON_GPU else ["triton"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device whose kernels are tested: "cuda", or "cpu" with Triton's kernels in place of the CPU's.

    On a GPU everything runs twice: as the library fills the CUDA key, and with Triton's kernels only.
    """
    if not HAS_TRITON:
        pytest.skip("NO TRITON: the GPU kernels are NOT TESTED; pip install triton")
    if os.environ.get("FAIL_WITHOUT_CUDA") and not ON_GPU:
        pytest.fail("FAIL_WITHOUT_CUDA is set, but torch sees no GPU")
    from hourllava_ext import gpu

    where = "cuda" if ON_GPU else "cpu"
    library = gpu.fill(where.upper(), override=True) if request.param == "triton" else None
    yield where
    if library is not None:
        library._destroy()
