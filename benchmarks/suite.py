# SPDX-License-Identifier: Apache-2.0
"""What every benchmark of an operator is made of: shapes, peers, the work that is counted, and what the machine can do.

A result never appears when the values disagree: each benchmark first holds its own way to the reference's numbers.
"""

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from hourllava_ext import library

ROOT = Path(__file__).resolve().parents[1]
PAGE = 128
OURS = "hourllava"


@dataclass(frozen=True)
class Shape:
    """What an operator sees of a model."""

    name: str
    heads: tuple[int, int]  # of queries, of keys
    head_dim: int
    width: int  # of a token
    vision: int  # of a patch
    side: int  # patches along one side of a frame


SHAPES = [
    Shape("3B", (16, 2), 128, 2048, 1152, 27),
    Shape("7B", (28, 4), 128, 3584, 1152, 27),
    Shape("tiny", (2, 1), 48, 96, 96, 8),
]
DTYPES = [torch.bfloat16, torch.float32]
ROUND = 2e-3  # seconds that a timed round of calls takes at least on a GPU, where the clock is that of the host


def on_gpu() -> bool:
    """Whether tensors are made on a GPU: `--device cuda`."""
    return torch.get_default_device().type == "cuda"


def by_device(cpu: int, gpu: int) -> int:
    """A size that keeps the device busy for longer than a launch takes."""
    return gpu if on_gpu() else cpu


@dataclass
class Work:
    """What one call must do at the least; a rate is this over the time, and a bound of the machine over that."""

    bytes: float = 0.0
    flop: float = 0.0


@dataclass
class Bench:
    """One operator, pass and shape, and the ways to compute it; the first way is ours."""

    op: str
    step: str  # "forward", "backward" or "forward+backward"
    shape: str
    dtype: torch.dtype
    work: Work
    ways: dict[str, Callable[[], Any]]
    tolerance: float = 0.0
    agree: dict[str, Callable[[], Any]] = field(default_factory=dict)  # where a way's result needs another layout

    def run(self, benchmark: Any, way: str) -> None:
        """Compare this way with ours, then time it; skips a peer that cannot run here.

        Raises:
            AssertionError: the values differ by more than the tolerance.
        """
        ours = flat(self.agree.get(OURS, self.ways[OURS])())
        try:
            theirs = flat(self.agree.get(way, self.ways[way])())
        except (RuntimeError, ImportError) as error:
            if way == OURS:
                raise
            pytest.skip(f"{way} does not run here: {str(error).strip().splitlines()[0]}")
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(other.double(), mine.double(), rtol=0, atol=self.tolerance)
        del ours, theirs
        benchmark.group = f"{self.op} {self.step}, {self.shape}, {str(self.dtype).removeprefix('torch.')}"
        calls = calls_of(self.ways[way])
        benchmark.extra_info.update(
            op=self.op,
            step=self.step,
            shape=self.shape,
            dtype=str(self.dtype).removeprefix("torch."),
            way=way,
            bytes=self.work.bytes,
            flop=self.work.flop,
            threads=torch.get_num_threads(),
            calls=calls,
            peak_bytes=peak_of(self.ways[way]),
        )
        benchmark(repeated(self.ways[way], calls))


def repeated(way: Callable[[], Any], calls: int) -> Callable[[], None]:
    """So many calls, and on a GPU the end of the last."""

    def run() -> None:
        for _ in range(calls):
            way()
        if on_gpu():
            torch.cuda.synchronize()

    return run


def calls_of(way: Callable[[], Any]) -> int:
    """Calls in a timed round: one on the CPU; on a GPU as many as hide the time of launch and wait."""
    return max(1, min(100, round(ROUND / _seconds(repeated(way, 1), 3)))) if on_gpu() else 1


def peak_of(way: Callable[[], Any]) -> int | None:
    """Bytes that one call takes on a GPU beyond what is there before it."""
    if not on_gpu():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result."""
    return [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]


def size_of(*tensors: Tensor) -> float:
    """Bytes that reading or writing these takes."""
    return float(sum(t.numel() * t.element_size() for t in tensors))


def grad(function: Callable[[], Any], leaves: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The backward of a function that is computed once: what to time for a step backward."""
    outputs = [o for o in flat(function()) if o.requires_grad]
    cotangents = cotangents_of(outputs)
    return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)


def train(function: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of a function: what a step of training takes."""
    cotangents: list[Tensor] = []

    def step() -> tuple[Tensor, ...]:
        out = function()
        if not cotangents:
            cotangents.extend(cotangents_of([out]))
        return torch.autograd.grad([out], leaves, cotangents)

    return step


def cotangents_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The same random gradients for every way."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    return [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]


def frequencies(head_dim: int) -> Tensor:
    """(head_dim / 4,) float32: half of a head is rotated."""
    return 10000.0 ** -(torch.arange(head_dim // 4) / (head_dim // 4))


def tolerance(dtype: torch.dtype, scale: float = 16) -> float:
    return scale * torch.finfo(dtype).eps


def rates() -> dict[str, float]:
    """The machine's own rates: FLOP/s of torch's matrix product, bytes/s of a copy (read and written)."""
    found = {}
    side = by_device(2048, 8192)
    for dtype in DTYPES:
        a = torch.randn(side, side).to(dtype)
        found[f"gemm_{str(dtype).removeprefix('torch.')}"] = 2 * side**3 / _seconds(repeated(lambda a=a: a @ a, 1))
    source = torch.zeros(by_device(2**26, 2**29))
    target = torch.zeros_like(source)
    found["copy"] = 2 * size_of(source) / _seconds(repeated(lambda: target.copy_(source), 1))
    return found


def _seconds(function: Callable[[], Any], times: int = 9) -> float:
    function()
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begin)
    return median(taken)


def machine() -> dict[str, Any]:
    """Where and with what the numbers were made."""
    info = Path("/proc/cpuinfo")
    names = (
        [n.split(":")[1].strip() for n in info.read_text().splitlines() if "model name" in n] if info.exists() else []
    )
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "tier": library.build_info()["cpu_tier"],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hourllava": _version("hourllava"),
        "triton": _version("triton"),
        "gpu": torch.cuda.get_device_name() if on_gpu() else None,
        "cuda": torch.version.cuda if on_gpu() else None,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """None where there is no git, or no repository."""
    if (git := shutil.which("git")) is None:
        return None
    told = subprocess.run([git, "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return told.stdout.strip() or None


def _version(package: str) -> str | None:
    """None for what is not installed: the project itself may run from its folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
