# SPDX-License-Identifier: Apache-2.0
"""Fills the CUDA key, once: with a Triton kernel for every operator that the library holds no C++ kernel for."""

from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch

NAMESPACE = "hourllava_ext"


def triton_kernels() -> dict[str, Callable]:
    """The Triton kernels by the name of their operator, backward operators included."""
    from hourllava_ext import triton

    return {name: getattr(triton, name) for name in triton.__all__}


def on_its_device(kernel: Callable) -> Callable:
    """The kernel, launched on the device of its first argument, whichever device is the current one."""

    @wraps(kernel)
    def launched(*args: Any) -> Any:
        with torch.cuda.device_of(args[0]):
            return kernel(*args)

    return launched


def fill(key: str = "CUDA", override: bool = False) -> torch.library.Library:
    """Register the Triton kernels on a dispatch key, for as long as the result lives.

    Args:
        key: The dispatch key; AMD's GPUs share CUDA's.
        override: Take the place of kernels that are there.
    """
    library = torch.library.Library(NAMESPACE, "IMPL")
    for name, kernel in triton_kernels().items():
        there = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
        if override or not there:
            library.impl(name, on_its_device(kernel) if key == "CUDA" else kernel, key, allow_override=there)
    return library


# Only a torch that can make GPU tensors pays for the import of Triton, which it comes with.
HAS_TRITON = find_spec("triton") is not None
FILLED = fill() if HAS_TRITON and (torch.version.cuda or torch.version.hip) else None
