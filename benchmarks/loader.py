# SPDX-License-Identifier: Apache-2.0
"""Loading training samples against plainly reading the bytes of the same files, in one run.

    python -m benchmarks.loader [--rounds 5] [--workers 0 2]

All files are in the page cache for both, so that this is what loading costs beside the disk: checksums, conversion,
decoding, tokens, and with workers the way to the process that trains. A round of each kind and number of workers after
the other, as often as there are rounds, so that what else the machine does falls on all alike.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks.keep import keep
from benchmarks.suite import machine
from hourllava.data import Film
from hourllava.data.collator import Collator
from hourllava.data.dataset import ConversationDataset
from hourllava.data.mixture import load_mixture
from hourllava.data.tokenizer import build_tokenizer
from hourllava.memory import Repository
from hourllava.memory.catalogue import Video
from hourllava.memory.segments import pack_features, write_segment
from hourllava.model import HourLlavaConfig

FRAMES, TOKENS, WIDTH = 256, 64, 1152  # of a video's features, as so400m gives them after pooling
SEGMENT = 128  # frames
PLAIN = "plain reading"


@dataclass(frozen=True)
class Case:
    """Samples of one kind."""

    name: str
    dataset: ConversationDataset
    files: list[Path]  # all that their media are in; none for text
    loads: int  # samples of a round


def entry(number: int, **media: str) -> dict:
    question, answer = "What happens after the ball has crossed the meadow?", "A red triangle falls from the sky."
    turns = [{"from": ("human", "gpt")[i % 2], "value": (question, answer)[i % 2]} for i in range(10)]
    return {"id": number, **media, "conversations": turns}


def make_text(folder: Path) -> tuple[list[dict], list[Path]]:
    return [entry(i) for i in range(64)], []


def make_images(folder: Path) -> tuple[list[dict], list[Path]]:
    names = [f"{i}.jpg" for i in range(8)]
    for seed, name in enumerate(names):
        Image.fromarray(Film.random(seed, 60).frame(20, 1024)).resize((1024, 768)).save(folder / name, quality=90)
    return [entry(i, image=name) for i, name in enumerate(names)], [folder / name for name in names]


def make_videos(folder: Path) -> tuple[list[dict], list[Path]]:
    names = [f"{i}.mp4" for i in range(2)]
    for seed, name in enumerate(names):
        Film.random(seed, 60).write(folder / name, size=384, fps=8, progress=False)
    return [entry(i, video=name) for i, name in enumerate(names)], [folder / name for name in names]


def make_memories(folder: Path, precision: str) -> tuple[list[dict], list[Path]]:
    repository = Repository(folder / precision)
    shape = {"feature_width": WIDTH, "per_frame": TOKENS, "width": 2048, "blocks": 4, "kv_heads": 2, "head_dim": 128}
    names = [f"{i}.mp4" for i in range(3)]
    for name in names:
        video = Video(name, "", "", "", precision, False, dtype="bfloat16", created=0.0, **shape)
        repository.catalogue.add(video)
        (repository.folder / name).mkdir()
        for first in range(0, FRAMES, SEGMENT):
            packed = pack_features(torch.randn(SEGMENT, TOKENS, WIDTH), precision)
            segment = write_segment(repository.folder / name, video, first, packed, 0.0)
            repository.catalogue.commit(name, segment, "")
    files = sorted(repository.folder.glob("*/*.safetensors"))
    return [entry(i, features=f"{precision}/{name}") for i, name in enumerate(names)], files


def make_original(folder: Path) -> tuple[list[dict], list[Path]]:
    names = [f"{i}.pt" for i in range(3)]
    for name in names:
        torch.save({"vid_feat": torch.randn(FRAMES, TOKENS, WIDTH), "duration": float(FRAMES)}, folder / name)
    return [entry(i, features=name) for i, name in enumerate(names)], [folder / name for name in names]


KINDS: dict[str, tuple[Callable[[Path], tuple[list[dict], list[Path]]], int]] = {
    "text": (make_text, 512),
    "image 1024 x 768, tiles": (make_images, 16),
    "video 60 s of 384 x 384, decoded": (make_videos, 4),
    "256 s of features, bfloat16": (lambda folder: make_memories(folder, "bfloat16"), 6),
    "256 s of features, int8": (lambda folder: make_memories(folder, "int8"), 6),
    "256 s of features, .pt float32": (make_original, 6),
}


def make_case(name: str, folder: Path, loads: int) -> Case:
    entries, files = KINDS[name][0](folder)
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(one) + "\n" for one in entries))
    tokenizer = build_tokenizer()
    dataset = ConversationDataset(load_mixture(manifest), tokenizer, HourLlavaConfig(time_instruction=True))
    return Case(name, dataset, files, loads)


class Repeated(Dataset):
    """The samples of a dataset over and over."""

    def __init__(self, dataset: ConversationDataset, length: int) -> None:
        self.dataset, self.length = dataset, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> object:
        return self.dataset[number % len(self.dataset)]


def load_seconds(case: Case, workers: int) -> float:
    """Seconds a sample, after every worker has given its first."""
    first = max(1, workers) * 2
    collate = Collator(case.dataset.tokenizer)
    repeated = Repeated(case.dataset, case.loads + first)
    batches = iter(DataLoader(repeated, 1, num_workers=workers, collate_fn=collate))  # type: ignore[arg-type]
    for _ in range(first):
        next(batches)
    started = time.perf_counter()
    for _ in batches:
        pass
    return (time.perf_counter() - started) / case.loads


def read_seconds(case: Case) -> float:
    """Seconds to read a sample's share of the files into memory."""
    times = -(-max(len(case.files), case.loads) // len(case.files))  # every file as often
    started = time.perf_counter()
    for file in case.files * times:
        file.read_bytes()
    return (time.perf_counter() - started) / times / len(case.dataset)


def measure(case: Case, rounds: int, workers: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each number of workers, and one for plain reading; medians of the rounds."""
    ways: dict[str, Callable[[], float]] = {}
    if case.files:
        ways[PLAIN] = lambda: read_seconds(case)
    for count in workers:
        ways[f"{count} workers"] = lambda count=count: load_seconds(case, count)  # type: ignore[misc]
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            taken[way].append(run())
    megabytes = sum(file.stat().st_size for file in case.files) / len(case.dataset) / 1e6
    return [
        {"sample": case.name, "way": way, "megabytes": megabytes, "median": median(seconds), "seconds": seconds}
        for way, seconds in taken.items()
    ]


def show(results: list[dict[str, Any]]) -> None:
    """Print a table, a row for each way."""
    where = machine()
    table = Table(title=f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}")
    for name in ("sample", "way", "samples/s", "MB a sample", "MB/s", "times plain reading"):
        table.add_column(name, justify="left" if name in ("sample", "way") else "right")
    plain = {one["sample"]: one["median"] for one in results if one["way"] == PLAIN}
    last = ""
    for one in results:
        row = [one["sample"] if one["sample"] != last else "", one["way"], f"{1 / one['median']:.1f}"]
        if one["megabytes"]:
            row += [f"{one['megabytes']:.2f}", f"{one['megabytes'] / one['median']:.0f}"]
            row.append(f"{one['median'] / plain[one['sample']]:.1f}")
        last = one["sample"]
        table.add_row(*row)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="the median of so many is shown")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="processes that load")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for name, (_, loads) in tqdm(KINDS.items(), "loading", unit="kind"):
        with tempfile.TemporaryDirectory() as folder:
            results += measure(make_case(name, Path(folder), loads), options.rounds, options.workers)
    show(results)
    print(keep("loader", results))


if __name__ == "__main__":
    main()
