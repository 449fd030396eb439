# SPDX-License-Identifier: Apache-2.0
"""Features of videos from shards, at the size of the models, beside plainly reading the bytes of the same files.

    python -m benchmarks.shards [--videos 24] [--seconds 120]

Every reader gives every video once. What it reads has just been written, so that it comes from memory and not from the
disk: what is measured is the reading itself.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

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


def readers(folder: Path) -> Iterator[tuple[str, Callable[[], Iterable]]]:
    """Names of ways to read every video once."""
    shards = sorted((folder / "shards").glob("*.mds"))
    dataset = ShardDataset(folder / "shards", shuffle_seed=0)
    yield PLAIN, lambda: (path.read_bytes() for path in shards)
    yield "shards, first epoch: hashes are checked", lambda: dataset
    yield "shards, later epochs", lambda: dataset
    for workers in (1, 2):
        yield f"shards, later epochs, {workers} workers", lambda n=workers: ShardLoader(dataset, n)  # type: ignore[misc]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=24)
    parser.add_argument("--seconds", type=int, default=120, help="of each video")
    args = parser.parse_args()
    size = args.videos * args.seconds * TOKENS * WIDTH * 2 / 1e6
    threads = torch.get_num_threads()
    print(f"{args.videos} videos of {args.seconds} s, {size:.0f} MB in bfloat16, {threads} threads")
    with TemporaryDirectory() as folder:
        write(Path(folder), args.videos, args.seconds)
        for name, read in readers(Path(folder)):
            began = time.perf_counter()
            for _ in read():
                pass
            took = time.perf_counter() - began
            print(f"{name:40} {args.videos / took:8.1f} videos/s {size / took:8.0f} MB/s")


if __name__ == "__main__":
    main()
