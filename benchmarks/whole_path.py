# SPDX-License-Identifier: Apache-2.0
"""The whole path: `python -m benchmarks.whole_path [--minutes 60] [--folder build/whole_path]`.

A file is decoded by one core and by all, then `hourllava ask` watches it and answers two questions. The files are the
demo's film as it is, and the same film as a camera would give it: enlarged, at 25 pictures a second, with grain.
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

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.suite import ROOT, machine
from hourllava.data import Film
from hourllava.video import open_video, repeat_video, write_video

FPS = 25
QUESTIONS = ("Which colour was the star?", "Where was the heart?")


@dataclass(frozen=True)
class Result:
    """Seconds of wall time, but for `peak_mib`: the resident memory of `hourllava ask` at its highest."""

    video: str
    one_core: float
    all_cores: float
    watch: dict[str, float]
    first: float  # watching and the first question
    second: float  # the second question
    peak_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=Path("build/whole_path"))
    parser.add_argument("--heights", type=int, nargs="+", default=[128, 360, 1080])
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    results = [measure(make(given.folder, height, given.minutes)) for height in given.heights]
    show(results)
    kept = ROOT / "benchmarks/results" / time.strftime("whole-path-%Y-%m-%d-%H%M%S.json")
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps({"machine": machine(), "results": [asdict(r) for r in results]}, indent=1) + "\n")
    print(kept.relative_to(ROOT))


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
    repeat_video(minute, path, minutes)
    minute.unlink()
    return path


def _camera(height: int) -> Iterator[np.ndarray]:
    """One minute of pictures (height, width, 3) uint8: a film of 64 pixels enlarged, under grain that moves."""
    width = height * 16 // 9
    film = Film.random(2**51, 60)
    rows, columns = np.arange(height) * 64 // height, np.arange(width) * 64 // width
    grain = np.random.default_rng(0).integers(-2, 3, (height + 64, width + 64, 1), dtype=np.int16)
    for index in range(60 * FPS):
        y, x = index * 7 % 64, index * 13 % 64
        picture = film.frame(index / FPS, 64)[rows][:, columns] + grain[y : y + height, x : x + width]
        yield np.clip(picture, 0, 255).astype(np.uint8)


def measure(video: Path) -> Result:
    """Decode the file alone, then ask it in a process of its own.

    Raises:
        AssertionError: one core and all of them do not give the same pictures.
    """
    one_core, expected = decode(video, 1)
    all_cores, checksum = decode(video, torch.get_num_threads())
    assert checksum == expected, "one core and all cores give different pictures"
    command = [sys.executable, "-m", "hourllava", "ask", str(video), *QUESTIONS, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        document = json.loads(process.stdout.read())
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0  # it has been waited for
    asked = [sum(answer["timings"].values()) for answer in document["answers"]]
    watch = document["watch"]
    first = sum(watch.values()) + asked[0]
    return Result(video.name, one_core, all_cores, watch, first, asked[1], usage.ru_maxrss / 1024)


def decode(video: Path, threads: int) -> tuple[float, int]:
    """Seconds that decoding takes, and a checksum of all pictures."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        checksum, began = 0, time.perf_counter()
        for chunk in open_video(video).chunks(64):
            checksum = zlib.crc32(chunk.frames.numpy().tobytes(), checksum)
        return time.perf_counter() - began, checksum
    finally:
        torch.set_num_threads(before)


def show(results: list[Result]) -> None:
    table = Table("video", "decode, 1 core", "all cores", "", "first answer", "second", "", "peak")
    for r in results:
        decoding = [f"{r.one_core:.1f} s", f"{r.all_cores:.1f} s", f"{r.one_core / r.all_cores:.2f}x"]
        asking = [f"{r.first:.1f} s", f"{r.second:.2f} s", f"{r.first / r.second:.0f}x"]
        table.add_row(r.video, *decoding, *asking, f"{r.peak_mib:.0f} MiB")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
