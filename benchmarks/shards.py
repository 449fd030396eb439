# SPDX-License-Identifier: Apache-2.0
"""Features of videos from shards, at the size of the models, beside plainly reading the bytes of the same files.

    python -m benchmarks.shards [--videos 24] [--seconds 120] [--rounds 5]

Every reader gives every video once. What it reads has just been written, so that it comes from memory and not from the
disk: what is measured is the reading itself.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.keep import keep
from benchmarks.suite import machine
from hourllava.data.samples import Media, Sample
from hourllava.data.shards import ShardDataset, ShardLoader, write_shards

TOKENS, WIDTH = 64, 1152
PLAIN = "plain reading of the shards' bytes"


def write(folder: Path, videos: int, seconds: int) -> None:
    """Write shards of videos with random features."""
    samples = []
    for number in range(videos):
        path = folder / f"{number}.pt"
        torch.save({"vid_feat": torch.randn(seconds, TOKENS, WIDTH).half(), "duration": float(seconds)}, path)
        samples.append(Sample(f"{number}", (("<image>", "."),), (Media("features", path),), ""))
    write_shards(samples, folder / "shards")


def readers(folder: Path) -> dict[str, Callable[[], Iterable]]:
    """Ways to read every video once."""
    shards = sorted((folder / "shards").glob("*.mds"))
    dataset = ShardDataset(folder / "shards", shuffle_seed=0)
    return {
        PLAIN: lambda: (path.read_bytes() for path in shards),
        "shards, first epoch: hashes are checked": lambda: ShardDataset(folder / "shards", shuffle_seed=0),
        "shards, later epochs": lambda: dataset,
        "shards, 1 worker, hashes are checked": lambda: ShardLoader(dataset, 1),
        "shards, 2 workers, hashes are checked": lambda: ShardLoader(dataset, 2),
    }


def read_seconds(read: Callable[[], Iterable]) -> float:
    began = time.perf_counter()
    for _ in read():
        pass
    return time.perf_counter() - began


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--videos", type=int, default=24)
    parser.add_argument("--seconds", type=int, default=120, help="of each video")
    parser.add_argument("--rounds", type=int, default=5, help="the median of so many is shown")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        write(Path(folder), args.videos, args.seconds)
        size = sum(path.stat().st_size for path in (Path(folder) / "shards").glob("*.mds")) / 1e6
        ways = readers(Path(folder))
        for _ in ways["shards, later epochs"]():
            pass  # the first epoch of it
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in tqdm(range(args.rounds), "reading", unit="round"):
            for name, read in ways.items():  # in turn, so that what else the machine does falls on all alike
                taken[name].append(read_seconds(read))
    medians = {name: median(seconds) for name, seconds in taken.items()}
    where = machine()
    title = f"{args.videos} videos of {args.seconds} s, {size:.0f} MB in bfloat16"
    table = Table(title=f"{title}\n{where['cpu']}, {where['threads']} threads", title_justify="left")
    for name in ("way", "videos/s", "MB/s", "times plain reading"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for name, took in medians.items():
        table.add_row(name, f"{args.videos / took:.1f}", f"{size / took:.0f}", f"{took / medians[PLAIN]:.1f}")
    Console(width=120).print(table)
    about = {"videos": args.videos, "seconds_of_video": args.seconds, "megabytes": size}
    rows = [{"way": name, **about, "median": medians[name], "seconds": taken[name]} for name in ways]
    print(keep("shards", rows))


if __name__ == "__main__":
    main()
