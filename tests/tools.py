# SPDX-License-Identifier: Apache-2.0
"""What the operator tests have in common: the error rule, and the checks every operator must pass."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from hourllava_ext import library

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
CPU_TIERS = ["portable", "avx2", "avx512", "avx512_bf16"]


@contextmanager
def cpu_tier(name: str) -> Iterator[None]:
    """Run the CPU kernels on one instruction-set tier; skips where the machine lacks it."""
    binary = ctypes.CDLL(str(library.LIBRARY))
    binary.hourllava_ext_use_cpu_tier.argtypes = [ctypes.c_char_p]
    binary.hourllava_ext_use_cpu_tier.restype = ctypes.c_bool
    best = library.build_info()["cpu_tier"]
    if not binary.hourllava_ext_use_cpu_tier(name.encode()):
        pytest.skip(f"THIS MACHINE HAS NO {name}: its kernels are not tested here")
    try:
        yield
    finally:
        binary.hourllava_ext_use_cpu_tier(best.encode())


def assert_error_rule(ours: Tensor, plain: Tensor, exact: Tensor, what: str = "output") -> None:
    """Hold ``ours`` to at most twice the error of plain torch in the working dtype, plus rounding.

    Args:
        ours: Result of the operator.
        plain: The reference computed in the working dtype. Same shape and dtype as ``ours``
        exact: The reference computed in float64 from the same inputs; whole numbers must be equal.
        what: Name of the value, for the message.
    """
    assert ours.shape == plain.shape, f"{what}: shape {tuple(ours.shape)}, reference {tuple(plain.shape)}"
    assert ours.dtype == plain.dtype, f"{what}: {ours.dtype}, reference {plain.dtype}"
    if not ours.is_floating_point():
        assert torch.equal(ours, exact), f"{what}: differs from the reference"
        return
    finite = exact.isfinite()
    torch.testing.assert_close(ours[~finite].double(), exact[~finite].double(), rtol=0, atol=0, equal_nan=True)
    if not finite.any():
        return
    # Storing rounds by half a unit of the largest value; in float64 `exact` itself is rounded, a sum at a time.
    units = 64 if ours.dtype == torch.float64 else 0.5
    largest = exact[finite].abs().max().item()
    rounding = units * torch.finfo(ours.dtype).eps * largest
    error, plain_error = ((x[finite].double() - exact[finite].double()).abs().max().item() for x in (ours, plain))
    allowed = 2 * plain_error + rounding
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g} (largest value {largest:.3g})"


def run(function: Callable[..., Any], args: Sequence[Any], exact: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of one call, on fresh leaves; ``exact`` raises every floating argument to float64.

    The gradients are those of all tensors in ``args`` that require one, under fixed random output gradients, which are
    the same numbers for every working dtype.
    """
    raised = [_leaf(a, exact) if isinstance(a, Tensor) else a for a in args]
    out = function(*raised)
    outputs = list(out) if isinstance(out, tuple) else [out]
    leaves = [a for a in raised if isinstance(a, Tensor) and a.requires_grad]
    if not leaves:
        return outputs, []
    generator = torch.Generator().manual_seed(1)
    tracked, cotangents = [], []
    for output in outputs:
        # Numbers that are exact in every dtype, so every run gets the same ones.
        cotangent = torch.randn(output.shape, generator=generator).bfloat16().half()
        if output.requires_grad:
            tracked.append(output)
            cotangents.append(cotangent.to(output.dtype))
    gradients = torch.autograd.grad(tracked, leaves, cotangents)
    return [o.detach() for o in outputs], list(gradients)


def _leaf(tensor: Tensor, exact: bool) -> Tensor:
    raised = tensor.detach().double() if exact and tensor.is_floating_point() else tensor.detach()
    return raised.clone(memory_format=torch.preserve_format).requires_grad_(tensor.requires_grad)


def assert_matches_reference(ours: Callable[..., Any], reference: Callable[..., Any], *args: Any) -> None:
    """Outputs and every gradient of ``ours`` against ``reference``, by the error rule.

    Args:
        ours, reference: Functions of the same arguments; keywords go in a lambda or ``functools.partial``.
        args: Arguments in the working dtype. Tensors with ``requires_grad`` are those whose gradients are compared.
    """
    results = run(ours, args), run(reference, args), run(reference, args, exact=True)
    for kind, *values in zip(("output", "gradient"), *results, strict=True):
        for i, (mine, plain, exact) in enumerate(zip(*values, strict=True)):
            assert_error_rule(mine, plain, exact, f"{kind} {i}")


def assert_repeatable(function: Callable[..., Any], *args: Any) -> None:
    """The same bits, outputs and gradients, from run to run and with 1, 2 and 3 threads."""
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            outputs, gradients = run(function, args)
            runs.append(outputs + gradients)
    finally:
        torch.set_num_threads(before)
    for again in runs[1:]:
        for first, other in zip(runs[0], again, strict=True):
            # assert_close with no tolerance takes equal NaNs and infinities for equal.
            torch.testing.assert_close(other, first, rtol=0, atol=0, equal_nan=True)


def assert_compiles_fullgraph(function: Callable[..., Any], *args: Any) -> None:
    """One graph, no breaks, and the eager results; without inductor, whose compiles are slow."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(run(function, args), run(compiled, args), strict=True):
        torch.testing.assert_close(traced, eager, rtol=0, atol=0, equal_nan=True)


def count_compilations(function: Callable[..., Any], calls: Sequence[Sequence[Any]]) -> int:
    """How often the function is compiled for these arguments, one call after the other, with its gradients."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter)
    for args in calls:
        run(compiled, args)
    return counter.frame_count


def on(device: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of CPU tensors that computes on a device."""

    def move(value: Any, to: str) -> Any:
        return value.to(to) if isinstance(value, Tensor) else value

    def moved(*args: Any) -> Any:
        out = function(*(move(a, device) for a in args))
        return tuple(move(o, "cpu") for o in out) if isinstance(out, tuple) else move(out, "cpu")

    return moved


class Called(TorchDispatchMode):
    """Names of the operators that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name().removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random numbers that want a gradient."""
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def frequencies(count: int) -> Tensor:
    """Radians per position, as models choose them. (count,) float32"""
    return 10000.0 ** -(torch.arange(count) / max(count, 1))
