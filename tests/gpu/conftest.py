# SPDX-License-Identifier: Apache-2.0
"""Where the GPU's kernels run: on a GPU if there is one, else on the CPU.

Without a GPU, Triton's kernels run in its interpreter, and those in CUDA as emulated threads.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import emulation
import pytest
import torch

HAS_TRITON = find_spec("triton") is not None
ON_GPU = torch.cuda.is_available()
# On a GPU everything runs twice: as the library fills the CUDA key, and with Triton's kernels only.
KERNELS = ["library", "triton"] if ON_GPU else ["triton", "emulated"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test that asks for a device runs with each room's kernels, in each dtype if it asks for one."""
    if "device" not in metafunc.fixturenames:
        return
    rooms = [k for k in KERNELS if k != "emulated" or getattr(metafunc.module, "HAS_CUDA_KERNELS", True)]
    if "dtype" not in metafunc.fixturenames:
        metafunc.parametrize("device", rooms, indirect=True, scope="module")
        return
    # Triton's interpreter gets bfloat16 wrong; its compiled kernels are tested in it on a GPU.
    cases = [(k, d) for k in rooms for d in DTYPES if ON_GPU or (k, d) != ("triton", torch.bfloat16)]
    ids = [f"{k}-{str(d).removeprefix('torch.')}" for k, d in cases]
    metafunc.parametrize(("device", "dtype"), cases, indirect=["device"], ids=ids, scope="module")


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device whose kernels are tested: "cuda", or "cpu" with a room's kernels in place of the CPU's."""
    if os.environ.get("FAIL_WITHOUT_CUDA") and not ON_GPU:
        pytest.fail("FAIL_WITHOUT_CUDA is set, but torch sees no GPU")
    if request.param == "triton" and not HAS_TRITON:
        pytest.skip("NO TRITON: its kernels are NOT TESTED; pip install triton")
    from hourllava_ext import gpu

    where = "cuda" if ON_GPU else "cpu"
    library = None
    if request.param == "triton":
        library = gpu.fill(where.upper(), override=True)
    elif request.param == "emulated":
        library = emulation.fill()
    yield where
    if library is not None:
        library._destroy()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """What a kernel did to the GPU that CUDA does not forgive fails this test alone: xdist replaces a lost process."""
    yield
    if not ON_GPU or not hasattr(item.config, "workerinput"):
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        os.write(2, f"the GPU is lost to this process: {str(error).splitlines()[0]}\n".encode())
        os._exit(1)
