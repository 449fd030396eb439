# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on the CPU: built by the C++ compiler, each thread of theirs emulated."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE = "hourllava_emulated"
# In which the threads of a block take turns: ascending, descending, odd ones first. None take any: a launch is checked.
ORDERS = (0, 1, 2)
NO_THREADS = -1


def tool(name: str) -> str:
    """A program that lies beside Python, or on the PATH."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]))
    assert found, f"{name} is missing; pip install {name}"
    return found


@cache
def build() -> ctypes.CDLL:
    """Compile what has changed, and register the operators of NAMESPACE."""
    folder = ROOT / "build" / "emulated"
    settings = {"TORCH_ROOT": Path(torch.__file__).parent, "CMAKE_MAKE_PROGRAM": tool("ninja")}
    source = ROOT / "tests" / "gpu" / "emulated"
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    for command in (["-S", source, "-B", folder, "-G", "Ninja", *defines], ["--build", folder]):
        done = subprocess.run([tool("cmake"), *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    torch.ops.load_library(folder / "emulated.so")
    return ctypes.CDLL(str(folder / "emulated.so"))


def fill() -> torch.library.Library:
    """Put the emulated kernels in the place of the CPU's, for as long as the result lives."""
    build()
    library = torch.library.Library("hourllava_ext", "IMPL")
    names = [n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith(f"{NAMESPACE}::")]
    for name in names:
        library.impl(name, getattr(getattr(torch.ops, NAMESPACE), name), "CPU", allow_override=True)
    return library


@contextmanager
def thread_order(order: int) -> Iterator[None]:
    """The threads of every block take turns in this order."""
    build().emulated_order(order)
    try:
        yield
    finally:
        build().emulated_order(0)
