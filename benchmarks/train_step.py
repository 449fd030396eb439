# SPDX-License-Identifier: Apache-2.0
"""A training step of MemAug, forward and backward, beside the same blocks written as the original writes them.

    python -m benchmarks.train_step [--size 3b] [--seconds 128] [--blocks 2] [--dtype float32] [--rounds 3]

Each runs in a process of its own, so that its peak memory is its own: what the resident set grows over inputs and
weights on a CPU, the allocator's peak on a GPU. Both start from the same weights and inputs, and have to agree.
"""

import argparse
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, multiprocessing
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config

from hourllava.memory.pages import video_layout
from hourllava.model.memaug import Block, MemAug, rotary_frequencies
from hourllava.model.stream import QueryStream

SIZES = {"3b": (2048, 16, 2), "7b": (3584, 28, 4), "tiny": (64, 2, 1)}  # width, heads, key heads
PER_FRAME, KEPT, TEXT = 64, 16, 64
OURS, ORIGINAL = "paged", "as the original"


@dataclass(frozen=True)
class Case:
    """What both run."""

    size: str
    seconds: int
    blocks: int
    dtype: torch.dtype
    rounds: int
    device: str

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
    """SPEC A.5 with B.3's costs: K and V of the whole memory for every block, K rotated into a copy, angles built for
    every call, attention run a second time in the backward pass.
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


def measure(_: int, way: str, case: Case, path: str) -> None:
    """Run one way in this process: a step of a few seconds of video to warm up, then what is asked for."""
    network, queries, memory, stream = build(case)
    leaves = [queries, memory, *network.parameters()]
    before, times = _memory(case.device, start=True), []
    gradients: list[Tensor] = []
    for _ in range(case.rounds):
        started = time.perf_counter()
        out = WAYS[way](network, queries, memory, stream, case)
        gradients = list(torch.autograd.grad(out.float().square().mean(), leaves))
        if case.device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = _memory(case.device) - before
    shares = [float(g.double().norm()) for g in gradients]
    torch.save({"median": statistics.median(times), "peak": peak, "out": out.detach().cpu(), "norms": shares}, path)


def _memory(device: str, start: bool = False) -> int:
    if device != "cpu":
        if start:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compare(case: Case) -> dict[str, dict[str, Any]]:
    """What each way took, once both have given the same."""
    found = {}
    with TemporaryDirectory() as folder:
        for number, way in enumerate(WAYS):
            path = str(Path(folder) / str(number))
            multiprocessing.spawn(measure, (way, case, path))
            found[way] = torch.load(path)
    loose = 1e-3 if case.dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found[OURS]["out"], found[ORIGINAL]["out"], rtol=loose, atol=loose)
    torch.testing.assert_close(*(torch.tensor(found[way]["norms"]) for way in WAYS), rtol=10 * loose, atol=loose)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--seconds", type=int, default=128, help="of video")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = Case(args.size, args.seconds, args.blocks, getattr(torch, args.dtype), args.rounds, device)
    found = compare(case)
    shape = f"{args.size}, {args.seconds} s of video, {args.blocks} blocks, {case.queries} queries, {args.dtype}"
    print(f"{shape}, {device}, {torch.get_num_threads()} threads")
    print(f"{'way':18}{'step':>10}{'peak memory':>16}")
    for way, told in found.items():
        print(f"{way:18}{told['median']:9.2f}s{told['peak'] / 2**20:12.0f} MiB")
    time_ratio, memory_ratio = (found[ORIGINAL][name] / found[OURS][name] for name in ("median", "peak"))
    print(f"paged takes 1/{time_ratio:.2f} of the time and 1/{memory_ratio:.2f} of the memory")


if __name__ == "__main__":
    main()
