# SPDX-License-Identifier: Apache-2.0
"""What every benchmark of an operator is made of: shapes, peers, the work that is counted, and what the machine can do.

A result never appears when the values disagree: each benchmark, also ours, first holds its way to the reference.
"""

import ctypes
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from hourllava_ext import library, reference

ROOT = Path(__file__).resolve().parents[1]
PAGE = 128
OURS, REFERENCE = "hourllava", "reference"


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
LONGEST_COPY = 2**28  # bytes; a longer one is no faster


def on_gpu() -> bool:
    """Whether tensors are made on a GPU: `--device cuda`."""
    return torch.get_default_device().type == "cuda"


def by_device(cpu: int, gpu: int) -> int:
    """A size that keeps the device busy for longer than a launch takes."""
    return gpu if on_gpu() else cpu


@dataclass
class Work:
    """What one call must do at the least; a rate is this over the time, and a bound of the machine over that."""

    bytes: float = 0.0  # read and written
    flop: float = 0.0
    held: float = 0.0  # bytes of a memory that is there before the call, where the benchmark is about its length


@dataclass
class Bench:
    """One operator, pass and shape, and the ways to compute it; the first way is ours.

    Each way's values are held to those of the way "reference", or to `expected` where that is another computation;
    they may differ by `tolerance` times the largest of a tensor.
    """

    op: str
    step: str  # "forward", "backward" or "forward+backward"
    shape: str
    dtype: torch.dtype
    work: Work
    ways: dict[str, Callable[[], Any]]
    tolerance: float = 0.0
    agree: dict[str, Callable[[], Any]] = field(default_factory=dict)  # where a way's result needs another layout
    expected: Callable[[], Any] | None = None
    notes: dict[str, Any] = field(default_factory=dict)  # kept with the result

    def run(self, benchmark: Any, way: str) -> None:
        """Hold this way to the values that are expected, then time it; skips a peer that cannot run here.

        Raises:
            AssertionError: the values differ by more than the tolerance.
        """
        expected = flat((self.expected or self.values_of(REFERENCE))())
        try:
            found = flat(self.values_of(way)())
        except (RuntimeError, ImportError) as error:
            if way == OURS:
                raise
            pytest.skip(f"{way} does not run here: {str(error).strip().splitlines()[0]}")
        check_values(found, expected, self.tolerance)
        del expected, found
        benchmark.group = f"{self.op} {self.step}, {self.shape}, {name_of(self.dtype)}"
        calls = calls_of(self.ways[way])
        benchmark.extra_info.update(
            op=self.op,
            step=self.step,
            shape=self.shape,
            dtype=name_of(self.dtype),
            way=way,
            bytes=self.work.bytes,
            flop=self.work.flop,
            held_bytes=self.work.held,
            threads=torch.get_num_threads(),
            calls=calls,
            peak_bytes=peak_of(self.ways[way]),
            copy=copy_seconds(self.work.bytes) if way == OURS else None,
            **self.notes,
        )
        benchmark(repeated(self.ways[way], calls))

    def values_of(self, way: str) -> Callable[[], Any]:
        return self.agree.get(way, self.ways[way])


def check_values(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Raise AssertionError unless each tensor is as expected, up to `tolerance` times its largest value."""
    for mine, right in zip(found, expected, strict=True):
        largest = float(right.abs().max()) if right.numel() else 0.0
        assert isfinite(largest), "the reference's values are not finite"
        torch.testing.assert_close(mine.double(), right.double(), rtol=0, atol=tolerance * largest)


@torch.no_grad()
def attention_in_parts(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, *rest: Tensor) -> Tensor:
    """The reference's attention (M, Hq, D) of one sample, to a few pages at a time: the scores of an hour are too many
    to exist at once.
    """
    parts = (reference.paged_attention(query.float(), keys, values, some, *rest) for some in table.split(32, 1))
    out, lse = next(parts)
    for other, sums in parts:
        out, lse = reference.merge_attention(torch.stack([out, other]), torch.stack([lse, sums]))
    return out


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    """Bytes that one call takes beyond what is there before it: allocated on a GPU, resident on the CPU; None where the
    system does not tell.
    """
    if not on_gpu():
        return _resident_peak(way)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _resident_peak(way: Callable[[], Any]) -> int | None:
    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # what was freed before would be taken again, and nothing would seem to be
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    except OSError:
        return None
    before = resident("VmRSS:")
    way()
    return max(0, resident("VmHWM:") - before)


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
        found[f"gemm_{name_of(dtype)}"] = 2 * side**3 / _seconds(repeated(lambda a=a: a @ a, 1))
    copied = 2.0 * by_device(LONGEST_COPY, 8 * LONGEST_COPY)
    found["copy"] = copied / copy_seconds(copied)
    return found


def copy_seconds(moved: float) -> float:
    """Seconds that torch's copy takes which reads and writes so many bytes in all, half of them each."""
    most = by_device(LONGEST_COPY, 8 * LONGEST_COPY)
    count = max(1, int(min(moved / 2, most)) // 4)
    # Zeros that nobody wrote take no memory, and reading them none of its time.
    source, target = torch.ones(count), torch.ones(count)
    calls = calls_of(lambda: target.copy_(source))
    seconds = _seconds(repeated(lambda: target.copy_(source), calls)) / calls
    return seconds * moved / (8 * count)


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
        "commit": _git("rev-parse", "HEAD") or None,
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),  # measured is not what was committed
    }


def _git(*arguments: str) -> str:
    """What git says of the project; nothing where there is no git."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def write_results(path: Path, content: str | bytes) -> None:
    """Write a file that holds either all of the content or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, document: dict[str, Any]) -> None:
    write_results(path, json.dumps(document, indent=1) + "\n")


def _version(package: str) -> str | None:
    """None for what is not installed: the project itself may run from its folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
