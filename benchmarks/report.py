# SPDX-License-Identifier: Apache-2.0
"""Draw a results file: `python -m benchmarks.report [RESULTS.json] [OUT.png]`; the newest one by default."""

import json
import sys
from pathlib import Path

import matplotlib

from benchmarks.suite import ROOT
from benchmarks.table import rows_of

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(source: Path, target: Path) -> None:
    """One bar a peer: how many times longer it takes than ours, on a logarithmic axis."""
    document = json.loads(source.read_text())
    rows = [row for row in rows_of(document) if row.peers][::-1]
    names = sorted({way for row in rows for way in row.peers})
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.3 * len(rows)), layout="constrained")
    height = 0.8 / len(names)
    for number, name in enumerate(names):
        places = [i + number * height for i, row in enumerate(rows) if name in row.peers]
        axes.barh(places, [row.peers[name] for row in rows if name in row.peers], height, label=name)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(rows))], [row.name for row in rows], fontsize=7)
    axes.set_xlabel("times the time of hourllava_ext; right of the line ours is faster")
    where = document["machine"]
    what = where.get("gpu") or f"{where['cpu']}, {where['threads']} threads, {where['tier']}"
    axes.set_title(f"{what}, torch {where['torch']}", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=150)


def main(arguments: list[str]) -> None:
    kept = sorted((ROOT / "benchmarks/results").glob("2*.json"))
    if not arguments and not kept:
        sys.exit("benchmarks: there are no results to draw; run `make bench` first")
    source = Path(arguments[0]) if arguments else kept[-1]
    target = Path(arguments[1]) if len(arguments) > 1 else source.with_suffix(".png")
    draw(source, target)
    print(target)


if __name__ == "__main__":
    main(sys.argv[1:])
