# SPDX-License-Identifier: Apache-2.0
"""The whole path: `python -m benchmarks.whole_path [--minutes 60] [--folder build/whole_path]`.

A file is decoded by one core and by all, then `hourllava ask` watches it and answers questions. The files are the
demo's film as it is, and the same film as a camera would give it: enlarged, at 25 pictures a second, with grain. At the
end, a profile says what a question about a memory that long consists of.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.suite import ROOT, machine, rates, write_json
from hourllava.data import Film
from hourllava.model import FrameWriter, load_model
from hourllava.model.watching import CHUNK, new_memory
from hourllava.video import open_video, repeat_video, write_video

FPS = 25
QUESTIONS = ("Which colour was the star?", "Where was the heart?")
LATER = 6  # questions after the first; the second one's time is the median of these
# Every core more may bring this much of itself; so many times faster a second question; so many bytes at the most.
DECODING, ASKING, MEMORY = 0.85, 50.0, 2 << 30


@dataclass(frozen=True)
class Result:
    """Seconds of wall time, but for `peak_mib`: the resident memory of `hourllava ask` at its highest."""

    video: str
    budget: str  # what of the memory a question reads
    one_core: float
    all_cores: float
    watch: dict[str, float]
    first: float  # watching and the first question
    second: float  # a question after the first
    stages: dict[str, float]  # of the second
    peak_mib: float

    @property
    def name(self) -> str:
        return f"{self.video}, {self.budget} read"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=Path("build/whole_path"))
    parser.add_argument("--heights", type=int, nargs="+", default=[128, 360, 1080])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 140)
    results, usual = [], load_model("tiny").config.memory_budget
    for height in given.heights:
        video = make(given.folder, height, given.minutes)
        decoding = decode_both(video)
        # How long a question takes does not depend on the file: of one of them, all is read, too.
        for budget in ("all", usual) if height == given.heights[0] else (usual,):
            results.append(measure(video, decoding, budget))
            console.print(f"{results[-1].name}: asked")
    parts, found = profile_question(60 * given.minutes), rates()
    show(results, parts, found["gemm_float32"], console)
    kept = given.results / time.strftime("whole-path-%Y-%m-%d-%H%M%S.json")
    document = {"machine": machine(), "rates": found, "results": [asdict(r) for r in results], "question": parts}
    write_json(kept, document)
    console.print(str(kept))


def make(folder: Path, height: int, minutes: int) -> Path:
    """A film of this height; one as high as the demo's is the demo's own, 4 pictures a second and square."""
    path = folder / f"film-{height}p-{minutes}min.mp4"
    if path.exists():
        return path
    if height == 128:
        Film.random(2**51, 60 * minutes).write(path)
        return path
    minute = folder / f"minute-{height}p.mp4"
    write_video(minute, _camera(height), FPS, (height, height * 16 // 9))
    part = path.with_suffix(".part.mp4")
    repeat_video(minute, part, minutes)
    part.replace(path)
    minute.unlink()
    return path


def _camera(height: int) -> Iterator[np.ndarray]:
    """One minute of pictures (height, width, 3) uint8: a film of 64 pixels enlarged, under grain that moves."""
    width = height * 16 // 9
    film = Film.random(2**51, 60)
    rows, columns = np.arange(height) * 64 // height, np.arange(width) * 64 // width
    # From -2 to 2; bytes wrap around, and pictures stay as far from their ends.
    grain = np.random.default_rng(0).integers(-2, 3, (height + 64, width + 64, 1)).astype(np.uint8).repeat(3, axis=2)
    for index in tqdm(range(60 * FPS), f"rendering {height}p", unit="frame"):
        y, x = index * 7 % 64, index * 13 % 64
        small = np.clip(film.frame(index / FPS, 64), 2, 253)
        yield small[rows].take(columns, axis=1) + grain[y : y + height, x : x + width]


def decode_both(video: Path) -> tuple[float, float]:
    """Seconds that decoding the file takes on one core, and on all.

    Raises:
        AssertionError: one core and all of them do not give the same pictures.
    """
    one_core, expected = decode(video, 1)
    all_cores, checksum = decode(video, torch.get_num_threads())
    assert checksum == expected, "one core and all cores give different pictures"
    return one_core, all_cores


def decode(video: Path, threads: int) -> tuple[float, int]:
    """Seconds that decoding takes, and a checksum of all pictures."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        checksum, began, opened = 0, time.perf_counter(), open_video(video)
        with tqdm(total=opened.frames_expected, desc=f"decoding {video.name}, {threads} threads", unit="s") as bar:
            for chunk in opened.chunks(64):
                checksum = zlib.crc32(chunk.frames.numpy().tobytes(), checksum)
                bar.update(len(chunk.frames))
        return time.perf_counter() - began, checksum
    finally:
        torch.set_num_threads(before)


def measure(video: Path, decoding: tuple[float, float], budget: str) -> Result:
    """Ask the file in a process of its own."""
    questions = [QUESTIONS[number % len(QUESTIONS)] for number in range(1 + LATER)]
    command = [sys.executable, "-m", "hourllava", "ask", str(video), *questions, "--json", "--budget", budget]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"benchmarks: `hourllava ask {video}` ended with exit code {process.returncode}")
    document = json.loads(output)
    asked = [answer["timings"] for answer in document["answers"]]
    stages = {stage: median(timings[stage] for timings in asked[1:]) for stage in asked[0]}
    first = sum(document["watch"].values()) + sum(asked[0].values())
    second = median(sum(timings.values()) for timings in asked[1:])
    return Result(
        video.name, budget, *decoding, document["watch"], first, second, stages, peak_mib=usage.ru_maxrss / 1024
    )


@torch.no_grad()
def profile_question(seconds: int) -> dict[str, float]:
    """What a question consists of that reads all of a memory that long: seconds of "all" of it, of each operator of
    ours, and of the "other" operators of torch; "flop" of the attention to the memory."""
    model = load_model("tiny")
    memory = new_memory(FrameWriter(model))
    features = torch.randn(CHUNK, memory.shape.per_frame, model.config.vision_width)
    while memory.frames < seconds:
        memory.append_features(features[: seconds - memory.frames])
    model.ask(memory, QUESTIONS[0], budget="all")
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        began = time.perf_counter()
        model.ask(memory, QUESTIONS[1], budget="all")
        parts = {"all": time.perf_counter() - began, "other": 0.0, "flop": 0.0}
    for event in recorded.key_averages(group_by_input_shape=True):
        name, took = event.key, event.self_cpu_time_total / 1e6
        ours = name.startswith("hourllava_ext::")
        parts[name if ours else "other"] = parts.get(name if ours else "other", 0.0) + took
        if name == "hourllava_ext::paged_attention":
            (rows, heads, width), keys = event.input_shapes[0], event.input_shapes[1]
            parts["flop"] += 4.0 * event.count * rows * heads * width * keys[0] * keys[2]
    return parts


def show(results: list[Result], parts: dict[str, float], gemm: float, console: Console) -> None:
    """A table of the results beside their targets, and what the second question's time goes to."""
    table = Table("video", "decode, 1 core", "all", "", "first answer", "waits/encodes/writes", "second", "", "peak")
    cores = torch.get_num_threads()
    for r in results:
        decoding, asking = r.one_core / r.all_cores, r.first / r.second
        table.add_row(
            r.name,
            f"{r.one_core:.1f} s",
            f"{r.all_cores:.1f} s",
            f"{decoding:.2f}x{_verdict(decoding >= DECODING * cores)}",
            f"{r.first:.1f} s",
            "/".join(f"{seconds:.1f}" for seconds in r.watch.values()),
            f"{r.second:.3f} s",
            f"{asking:.0f}x{_verdict(asking >= ASKING)}",
            f"{r.peak_mib:.0f} MiB{_verdict(r.peak_mib * 2**20 <= MEMORY)}",
        )
    console.print(table)
    console.print(
        f"Targets: decoding >= {DECODING * cores:.1f}x, a second question >= {ASKING:.0f}x faster, peak < 2 GiB. "
        "A star: not met."
    )
    attention = parts["hourllava_ext::paged_attention"]
    console.print(
        f"Of the {parts['all']:.3f} s of a question that reads all, attention to the memory takes {attention:.3f} s: "
        f"{parts['flop'] / 1e9:.0f} GFLOP at {parts['flop'] / attention / 1e9:.0f} GFLOP/s, where torch's product in "
        f"float32 reaches {gemm / 1e9:.0f}."
    )


def _verdict(met: bool) -> str:
    return "" if met else " *"


if __name__ == "__main__":
    main()
