# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled operators, once, and says how they were built."""

import ctypes
import sys
from pathlib import Path
from typing import TypedDict

import torch


def _find() -> Path:
    """The library beside this file; in the source folder, which Python searches first, the installed package's."""
    here, name = Path(__file__).parent, "_C.abi3.so"
    found = [place / name for place in (here, *(Path(entry) / here.name for entry in sys.path))]
    library = next((file for file in found if file.exists()), None)
    if library is None:
        raise ImportError(
            f"hourllava_ext: {here / name} is missing, the operators have not been compiled; "
            "run `pip install -e . --no-build-isolation` in the repository"
        )
    return library.absolute()


LIBRARY = _find()
torch.ops.load_library(LIBRARY)


class BuildInfo(TypedDict):
    """How the loaded operators were built."""

    library: str
    torch: str
    torch_abi: str
    cpu_tier: str
    cuda: bool


def build_info() -> BuildInfo:
    """How the loaded operators were built: what `hourllava doctor` prints.

    Returns:
        ``library`` (path), ``torch`` (installed version), ``torch_abi`` (oldest torch the binary serves), ``cpu_tier``
        ("avx512_bf16", "avx512", "avx2" or "portable": the instruction set picked when the library was loaded) and
        ``cuda`` (whether CUDA kernels are in the binary).
    """
    binary = ctypes.CDLL(str(LIBRARY))
    binary.hourllava_ext_cpu_tier.restype = ctypes.c_char_p
    binary.hourllava_ext_torch_target.restype = ctypes.c_uint64
    binary.hourllava_ext_cuda_built.restype = ctypes.c_bool
    target = binary.hourllava_ext_torch_target()
    return {
        "library": str(LIBRARY),
        "torch": torch.__version__,
        # One byte each for major and minor, at the top.
        "torch_abi": f"{target >> 56}.{target >> 48 & 0xFF}",
        "cpu_tier": binary.hourllava_ext_cpu_tier().decode(),
        "cuda": binary.hourllava_ext_cuda_built(),
    }
