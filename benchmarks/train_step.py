# SPDX-License-Identifier: Apache-2.0
"""A training step of MemAug, forward and backward, beside the same blocks written as the original writes them.

    python -m benchmarks.train_step [--size 3b] [--seconds 600] [--blocks 1] [--dtype bfloat16 float32] [--rounds 2]

By default ten minutes of video, 39,000 tokens of memory and 2,614 queries. First both ways are held to float64 at eight
seconds, values and every gradient; then each runs in a process of its own, so that its peak memory is its own: what the
resident set grows over inputs and weights on a CPU (of Linux), the allocator's peak on a GPU. Their values and
gradients are compared again before a number is printed.
"""

import argparse
import copy
import ctypes
import os
import re
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, multiprocessing
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import Qwen2Config

from benchmarks.keep import keep
from benchmarks.suite import machine
from hourllava.memory.pages import video_layout
from hourllava.model.memaug import Block, MemAug, rotary_frequencies
from hourllava.model.stream import QueryStream

SIZES = {"3b": (2048, 16, 2), "7b": (3584, 28, 4), "tiny": (64, 2, 1)}  # width, heads, key heads
PER_FRAME, KEPT, TEXT = 64, 16, 64
OURS, ORIGINAL = "paged", "as the original"
CHECKED = 8  # seconds of video that are held to float64
APART = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # how far values and gradients may be apart, beside their size
# On a CPU, torch's LayerNorm adds up these gradients in bfloat16, which is off by more than that after thousands of
# rows. At eight seconds, ours are held to float64.
NORMS = re.compile(r"norm\d\.(weight|bias)$")


@dataclass(frozen=True)
class Case:
    """What both run."""

    size: str
    seconds: int
    blocks: int
    dtype: torch.dtype
    rounds: int
    device: str
    threads: int

    @property
    def frames(self) -> int:
        """Frames that stay queries."""
        return max(1, min(512, self.seconds // 4))

    @property
    def queries(self) -> int:
        return self.frames * (KEPT + 1) + TEXT


def build(case: Case) -> tuple[MemAug, Tensor, Tensor, QueryStream]:
    """Weights, queries (M, C), memory tokens (R, C) in the pages' order, and where the queries stand."""
    torch.manual_seed(0)
    width, heads, key_heads = SIZES[case.size]
    config = Qwen2Config(hidden_size=width, num_attention_heads=heads, num_key_value_heads=key_heads)
    place: dict[str, Any] = {"device": case.device, "dtype": case.dtype}
    network = MemAug(config, case.blocks).to(**place)
    rows = case.seconds * (PER_FRAME + 1)
    queries = torch.randn(case.queries, width, **place).requires_grad_()
    memory = torch.randn(rows, width, **place).requires_grad_()
    positions = torch.linspace(0, rows - 1, case.queries, device=case.device).to(torch.int64)
    bounds = torch.tensor([0, case.queries], device=case.device)
    return network, queries, memory, QueryStream(positions, bounds, [case.queries])


def paged(network: MemAug, queries: Tensor, memory: Tensor, stream: QueryStream, case: Case) -> Tensor:
    layout = video_layout(case.seconds, PER_FRAME, memory.device)
    return network(queries, stream, network.write(memory, layout))[0]


def as_the_original(network: MemAug, queries: Tensor, memory: Tensor, stream: QueryStream, case: Case) -> Tensor:
    """The original's block with its costs: K and V of the whole memory for every block, K rotated into a copy, angles
    built for every call, attention run a second time in the backward pass.
    """
    inv_freq = rotary_frequencies(network.config, memory.device)
    positions = video_layout(case.seconds, PER_FRAME, memory.device).position_ids
    x = queries
    for block in network.blocks:
        x = block.norm1(x + checkpoint(_self_attention, block, x, stream, inv_freq, use_reentrant=False))
        attended = checkpoint(_cross_attention, block, x, memory, stream, positions, inv_freq, use_reentrant=False)
        x = block.norm2(x + attended)
        x = block.norm3(x + block.mlp(x))
    return x


def _self_attention(block: Block, x: Tensor, stream: QueryStream, inv_freq: Tensor) -> Tensor:
    own = block.self_attn
    heads = own.Wqkv(x).view(len(x), -1, own.head_dim)
    query, key, value = heads.split([own.heads, own.kv_heads, own.kv_heads], 1)
    query, key = (_rotate(part, stream.position_ids, inv_freq) for part in (query, key))
    return own.Wo(_attend(query, key, value))


def _cross_attention(
    block: Block, x: Tensor, memory: Tensor, stream: QueryStream, positions: Tensor, inv_freq: Tensor
) -> Tensor:
    cross = block.cross_attn
    query = _rotate(cross.Wq(x).view(len(x), -1, cross.head_dim), stream.position_ids, inv_freq)
    key, value = cross.keys_values(memory)
    return cross.Wo(_attend(query, _rotate(key, positions, inv_freq), value))


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads = [part.transpose(0, 1)[None] for part in (query, key, value)]
    return F.scaled_dot_product_attention(*heads, enable_gqa=True)[0].transpose(0, 1).flatten(1)


def _rotate(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """The first half of each head, in halves."""
    angle = torch.outer(positions.float(), inv_freq)
    cos, sin = (f(angle).to(x.dtype)[:, None] for f in (torch.cos, torch.sin))
    first, second, rest = x.split([len(inv_freq), len(inv_freq), x.shape[-1] - 2 * len(inv_freq)], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


WAYS = {OURS: paged, ORIGINAL: as_the_original}


Kept = dict[str, Tensor]


def step(way: str, network: MemAug, queries: Tensor, memory: Tensor, stream: QueryStream, case: Case) -> Kept:
    """The values and every gradient, by name."""
    out = WAYS[way](network, queries, memory, stream, case)
    named = {"queries": queries, "memory": memory, **dict(network.named_parameters())}
    torch.manual_seed(1)  # the same gradient comes in from above for both; a norm's square would hardly have one
    above = torch.randn(out.shape, device=case.device).to(out.dtype)
    gradients = torch.autograd.grad(out, list(named.values()), above)
    return {"values": out.detach()} | dict(zip(named, gradients, strict=True))


def check(case: Case) -> None:
    """Hold both ways to float64 on a short video: ours may be off by twice what the original's way is, and rounding.

    Raises:
        AssertionError: it is off by more.
    """
    short = replace(case, seconds=CHECKED)
    built = build(short)
    exact = copy.deepcopy(built[0]).double()
    doubled = [part.detach().double().requires_grad_() for part in built[1:3]]
    truth = step(ORIGINAL, exact, *doubled, built[3], replace(short, dtype=torch.float64))
    ours, theirs = (step(way, *built, short) for way in WAYS)
    for name, true in truth.items():
        allowed = 2 * distance(theirs[name], true) + torch.finfo(case.dtype).eps
        off = distance(ours[name], true)
        assert off <= allowed, f"{name} is off by {off:.1e}, and {allowed:.1e} are allowed"


def distance(one: Tensor, other: Tensor) -> float:
    """Of two tensors, beside the size of the second."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def measure(_: int, way: str, case: Case, path: str) -> None:
    """Run one way in this process: a short video to warm up, then what is asked for."""
    torch.set_num_threads(case.threads)
    short = replace(case, seconds=CHECKED)
    step(way, *build(short), short)
    built = build(case)
    before, times = _memory(case.device, start=True), []
    found: Kept = {}
    for _ in range(case.rounds):
        found.clear()
        started = time.perf_counter()
        found = step(way, *built, case)
        if case.device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = _memory(case.device) - before
    found = {name: part.cpu() for name, part in found.items()}
    torch.save({"seconds": times, "peak_bytes": peak, "found": found}, path)


def _memory(device: str, start: bool = False) -> int:
    """Bytes that were held at most since the start."""
    if device != "cpu":
        if start:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    if start:
        ctypes.CDLL(None).malloc_trim(0)  # what is freed is given back,
        Path("/proc/self/clear_refs").write_text("5")  # and what was held at most before is forgotten
    # Not getrusage's: that of a new process starts with what its parent held.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(peak)


def compare(case: Case) -> list[dict[str, Any]]:
    """What each way took, once both have given the same.

    Raises:
        AssertionError: values or a gradient differ.
    """
    check(case)
    told: list[dict[str, Any]] = []
    found: list[Kept] = []
    with TemporaryDirectory() as folder:
        for number, way in enumerate(tqdm(WAYS, "measuring", unit="way")):
            path = str(Path(folder) / str(number))
            multiprocessing.spawn(measure, (way, case, path))
            result = torch.load(path)
            found.append(result.pop("found"))
            about = asdict(case) | {"dtype": str(case.dtype).removeprefix("torch."), "seconds_of_video": case.seconds}
            told.append({"way": way, **about, **result, "median": statistics.median(result["seconds"])})
    for name, ours in found[0].items():
        if case.dtype == torch.bfloat16 and NORMS.search(name):
            continue
        off = distance(ours, found[1][name])
        assert off <= APART[case.dtype], f"{name} differs by {off:.1e}"
    return told


def show(results: list[dict[str, Any]]) -> None:
    """Print a table: a row for each way and dtype."""
    first, where = results[0], machine()
    tokens = first["seconds_of_video"] * (PER_FRAME + 1)
    title = f"{first['size']}, {first['seconds_of_video']} s of video ({tokens} tokens), {first['blocks']} blocks"
    place = where["gpu"] or f"{where['cpu']}, {first['threads']} threads"
    table = Table(title=f"{title}\n{place}, torch {where['torch']}", title_justify="left")
    for name in ("dtype", "way", "s a step", "times ours", "peak MiB", "times ours"):
        table.add_column(name, justify="left" if name in ("dtype", "way") else "right")
    for one in results:
        ours = next(other for other in results if other["way"] == OURS and other["dtype"] == one["dtype"])
        time_ratio, memory_ratio = (one[key] / ours[key] for key in ("median", "peak_bytes"))
        row = [f"{one['median']:.2f}", f"{time_ratio:.2f}", f"{one['peak_bytes'] / 2**20:.0f}", f"{memory_ratio:.2f}"]
        table.add_row(one["dtype"], one["way"], *row)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--seconds", type=int, default=600, help="of video")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["bfloat16"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    for dtype in args.dtype:
        case = Case(args.size, args.seconds, args.blocks, getattr(torch, dtype), args.rounds, device, args.threads)
        results += compare(case)
    show(results)
    print(keep("train-step", results))


if __name__ == "__main__":
    main()
