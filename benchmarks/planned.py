# SPDX-License-Identifier: Apache-2.0
"""What `hourllava plan --measure VIDEO` says of a video, beside what is then measured: `python -m benchmarks.planned`.

A film of the small model's is watched into a repository and asked from a pool. Rates and work are measured by turns,
and the median of each counts, so that a machine that is busy for a while is no worse for one than for the other.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.day import disk_bytes
from benchmarks.suite import machine
from benchmarks.whole_path import QUESTIONS, make
from hourllava.memory import MemoryPool, Repository
from hourllava.model import FrameWriter, HourLlavaForConditionalGeneration, load_model
from hourllava.model.budget import ALL
from hourllava.model.calibration import measure
from hourllava.model.planning import dtype_of, plan

ROUNDS = 3
BUDGETS = {"question": None, "question, all pages": ALL}


def work(model: HourLlavaForConditionalGeneration, film: Path, folder: Path, pages: int) -> dict[str, float]:
    """Seconds of every stage of one film, and bytes of its memory on the disk and in a pool."""
    repository, writer = Repository(folder), FrameWriter(model)
    memory = repository.add("film", writer, pages=True)
    began = time.perf_counter()
    model.watch(film, progress=False, into=memory)
    found = {**memory.timings, "watch": time.perf_counter() - began}
    memory.close()
    pool = MemoryPool(repository, writer, pages)
    with pool.use("film") as held:
        found |= {"bytes of pages": pool.usage()[0].used, "bytes on the disk": disk_bytes(folder)}
        for name, budget in BUDGETS.items():
            model.ask(held, QUESTIONS[0], budget=budget, max_new_tokens=1)
            found[name] = model.ask(held, QUESTIONS[1], budget=budget, max_new_tokens=1).timings["total"]
    return found


def run(minutes: int, films: Path) -> dict[str, tuple[float, float]]:
    """Planned and measured, by name."""
    model, film = load_model("tiny"), make(films, 360, minutes)
    planned = plan("tiny", minutes / 60)
    said, measured = [], []
    for _ in tqdm(range(ROUNDS), "rounds"):
        rates = measure(model.config, dtype_of(model.config), planned.queries, str(film))
        exact = rates.times(model.config, replace(planned, pages_read=planned.pages))
        said.append(rates.times(model.config, planned) | {"question, all pages": exact["question"]})
        with tempfile.TemporaryDirectory() as folder:
            measured.append(work(model, film, Path(folder), planned.device["pages"]))
    found = {what: median(one[what] for one in said) for what in said[0]}
    found["watch"] = found["decode"] + found["encode"] + found["write"]
    found |= {"bytes of pages": planned.device["pages"], "bytes on the disk": sum(planned.disk.values())}
    return {what: (found[what], median(one[what] for one in measured)) for what in measured[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("build/whole_path"), help="where films are kept")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    found = run(given.minutes, given.folder)
    result: dict[str, Any] = {what: {"planned": p, "measured": m} for what, (p, m) in found.items()}
    print(json.dumps({"machine": machine(), "minutes": given.minutes, **result}, indent=1))
    table = Table("", "planned", "measured", "planned / measured")
    for what, (said, measured) in found.items():
        table.add_row(what, f"{said:.4g}", f"{measured:.4g}", f"{said / measured:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
