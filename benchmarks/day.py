# SPDX-License-Identifier: Apache-2.0
"""A day in one memory: `python -m benchmarks.day`.

It is appended to a repository, reopened, asked from its files and from a pool, all within 6 GiB of RAM. The vision
tower is left out: its features of a rendered film of ten minutes are repeated.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.suite import machine
from hourllava.data import Film
from hourllava.memory import MemoryPool, Repository, format_size, parse_size
from hourllava.model import FrameWriter, load_model
from hourllava.model.planning import plan
from hourllava.model.watching import CHUNK

LIMIT = parse_size("6GiB")
FILM_SECONDS = 600
QUESTION = "Which colour was the star?"


class FeatureWriter(FrameWriter):
    """A writer whose frames hold only their number, three bytes of it, and whose features are those of a film."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        size, film = model.config.vision_config.image_size, Film.random(0, FILM_SECONDS)
        pictures = [torch.from_numpy(np.ascontiguousarray(frame)) for frame in film.frames(size)]
        with torch.no_grad():
            self.features = super().encode(torch.stack(pictures).permute(0, 3, 1, 2).contiguous())

    def encode(self, frames: Tensor) -> Tensor:
        number = (frames[:, :, 0, 0].long() << torch.tensor([0, 8, 16])).sum(1)
        return self.features[number % FILM_SECONDS]


def numbered(first: int, end: int) -> Tensor:
    """Frames (n, 3, 1, 1) that hold their numbers."""
    number = torch.arange(first, end)[:, None] >> torch.tensor([0, 8, 16])
    return (number & 255).to(torch.uint8)[:, :, None, None]


def append(repository: Repository, name: str, writer: FeatureWriter, frames: int) -> float:
    """Seconds that it takes to append and commit so many frames, a minute at a time."""
    memory = repository.add(name, writer, pages=True)
    began = time.perf_counter()
    for first in tqdm(range(0, frames, CHUNK), name, unit_scale=CHUNK, unit="s"):
        memory.append(numbered(first, min(first + CHUNK, frames)))
    took = time.perf_counter() - began
    memory.close()
    return took


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def peak_bytes() -> int:
    """The most RAM this process has had, mapped files among it."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def own_bytes() -> int:
    """RAM that is this process's own, no mapped files among it; 0 where the system does not tell."""
    told = Path("/proc/self/statm")
    resident, shared = map(int, told.read_text().split()[1:3]) if told.exists() else (0, 0)
    return (resident - shared) * resource.getpagesize()


def run(hours: float, folder: Path) -> dict[str, Any]:
    """Everything that is measured; seconds and bytes."""
    model = load_model("tiny")
    writer, repository = FeatureWriter(model), Repository(folder)
    planned, start = plan("tiny", hours), peak_bytes()
    lengths = {"hour": min(3600, planned.frames), "day": planned.frames}
    result: dict[str, Any] = {"hours": hours, "tokens": planned.tokens, "peak_of_the_program_alone": start}
    for name, frames in lengths.items():
        result[f"append_{name}"] = append(repository, name, writer, frames)
    result["append_times_real_time"] = planned.frames / result["append_day"]
    result["peak_after_append"] = peak_bytes()
    for name in lengths:
        memory, result[f"reopen_{name}"] = timed(lambda name=name: Repository(folder).open(name))
        answer, result[f"ask_{name}_in_files"] = timed(lambda memory=memory: model.ask(memory, QUESTION, budget="all"))
    result["peak_after_asking_files"] = peak_bytes()
    del memory
    own = own_bytes()
    budget = planned.device["pages"] + plan("tiny", 1.0).device["pages"]
    pool = MemoryPool(repository, writer, budget)
    for name in lengths:
        with pool.use(name):
            pass
    with pool.use("day") as held:
        again, result["ask_day_in_pool"] = timed(lambda: model.ask(held, QUESTION, budget="all"))
    assert again.text == answer.text
    assert torch.equal(again.mass, answer.mass)
    result |= {"peak": peak_bytes(), "disk_day": disk_bytes(folder / "day"), "disk_planned": sum(planned.disk.values())}
    result |= {
        "pool": sum(usage.used for usage in pool.usage()),
        "pool_planned": budget,
        "pool_in_ram": own_bytes() - own,
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--folder", type=Path, help="where to put some 8 GB for the time being")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = run(args.hours, Path(folder))
    print(json.dumps({"machine": machine(), **result}, indent=1))
    print(
        f"{result['tokens']:,} tokens appended at {result['append_times_real_time']:.0f} x real time; reopened in "
        f"{result['reopen_hour']:.3f} s (1 h) and {result['reopen_day']:.3f} s ({args.hours:g} h); peak "
        f"{format_size(result['peak'])} of {format_size(LIMIT)}, the program alone "
        f"{format_size(result['peak_of_the_program_alone'])}"
    )
    if result["peak"] > LIMIT:
        sys.exit(f"benchmarks: the peak is above {format_size(LIMIT)}")


if __name__ == "__main__":
    main()
