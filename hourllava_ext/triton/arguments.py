# SPDX-License-Identifier: Apache-2.0
"""The argument checks of the Triton kernels: shapes written as in the docstrings, dtypes, one device.

What indexes memory is not checked on a GPU: reading it would make the host wait.
"""

import torch
from torch import Tensor

ROWS = (torch.float32, torch.bfloat16, torch.float16)
WIDE = (torch.float32,)
INT64 = (torch.int64,)
INT32 = (torch.int32,)
BOOL = (torch.bool,)

Expected = tuple[Tensor, str, tuple[torch.dtype, ...]]


def check(op: str, **arguments: Expected) -> dict[str, int]:
    """The size of every dimension, from tensors with named dimensions: ``check("rope", x=(x, "M H D", ROWS), ...)``.

    A name stands for the same size wherever it comes, a number for itself, and ``B+1`` for one more than ``B``. All
    tensors of dtype ROWS share one dtype, and all tensors share a device.

    Raises:
        RuntimeError: A tensor differs from what is said of it.
    """
    sizes: dict[str, int] = {}
    first, (leader, _, _) = next(iter(arguments.items()))
    for name, (tensor, shape, dtypes) in arguments.items():
        got = tuple(tensor.shape)
        wanted = shape.split()
        require(len(got) == len(wanted), f"{op}: {name} must be ({', '.join(wanted)}), got shape {got}")
        for size, dimension in zip(got, wanted, strict=True):
            base, _, more = dimension.partition("+")
            expected = int(base) if base.isdigit() else sizes.setdefault(base, size - int(more or 0)) + int(more or 0)
            told = ", ".join(f"{k} = {v}" for k, v in sizes.items())
            require(size == expected, f"{op}: {name} must be ({', '.join(wanted)}), got shape {got} with {told}")
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        require(tensor.dtype in dtypes, f"{op}: on a GPU {name} must be {allowed}; convert it with .to()")
        rows = dtypes == ROWS and arguments[first][2] == ROWS
        require(not rows or tensor.dtype == leader.dtype, f"{op}: {name} must have the dtype of {first}")
        require(tensor.device == leader.device, f"{op}: {name} must be on the device of {first}, {leader.device}")
    return sizes


def require(ok: bool, message: str) -> None:
    """Raise RuntimeError unless ``ok``."""
    if not ok:
        raise RuntimeError(message)


def check_rotation(op: str, sizes: dict[str, int]) -> None:
    """The rotated dims 2F have to fit into a head of D."""
    require(
        2 * sizes["F"] <= sizes["D"],
        f"{op}: inv_freq rotates 2 * {sizes['F']} dims, but a head has {sizes['D']}",
    )


def check_groups(op: str, sizes: dict[str, int]) -> None:
    """Query heads Hq come in groups of equal size, one group to a key head."""
    query_heads, key_heads = sizes["Hq"], sizes["Hkv"]
    require(
        key_heads > 0 and query_heads > 0 and query_heads % key_heads == 0,
        f"{op}: query heads must be a multiple of key heads, got {query_heads} and {key_heads}",
    )
