# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled operators, once, and says how they were built."""

import ctypes
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, TypedDict

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


def register_fake(name: str) -> Callable[[Callable], Callable]:
    """Registers what computes the shapes of an operator's results, and makes it refuse tensors of several devices.

    One tensor on the meta device sends a call there, where nothing is computed: results for the others' device would be
    memory that nobody has written.
    """

    def register(fake: Callable) -> Callable:
        @wraps(fake)
        def checked(*args: Any, **kwargs: Any) -> Any:
            devices = {a.device for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)}
            if len(devices) > 1:
                told = " and ".join(sorted(str(d) for d in devices))
                raise RuntimeError(f"{name}: all tensors must be on one device, got some on {told}")
            return fake(*args, **kwargs)

        torch.library.register_fake(f"hourllava_ext::{name}", checked)
        return fake

    return register


def refuse_second_derivative(name: str) -> None:
    """Makes differentiating an operator's backward an error: torch would warn, and take the derivative for zero."""

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"{name}: has no second derivative; where one is needed, use hourllava_ext.reference.{name}")

    torch.library.register_autograd(f"hourllava_ext::{name}_backward", refuse)


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
