# SPDX-License-Identifier: Apache-2.0
"""Draw a results file: `python -m benchmarks.report [RESULTS.json] [OUT.png]`; the newest one by default.

Above, the operators at the 3B shape: how many times longer each peer takes, and the share of the machine's own rate.
Below, one question against the length of the video and against threads, as far as they were measured.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.suite import OURS, ROOT, write_results
from benchmarks.table import TORCH, Row, rows_of

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

SHAPE = "3B"
PEERS = {
    "torch": ("torch's own kernel (attention: SDPA, its fastest way)", "#1f77b4"),
    "original": ("the original's formula", "#e08214"),
    "reference": ("plain torch", "#9a9a9a"),
}
OTHERS = ("#2ca25f", "#8856a7", "#c51b8a", "#7a5230", "#17a2b8", "#5b5b2e", "#d62728")  # of further peers on a GPU
BOUNDS = {"copy": ("of a copy of the same bytes", "#4daf7c"), "gemm": ("of torch's matrix product", "#6a51a3")}
MINUTES = {1: "1 min", 10: "10 min", 60: "1 h", 360: "6 h", 1440: "24 h"}


def draw(source: Path, target: Path) -> None:
    """Draw the results of `source` into the PNG `target`.

    Raises:
        ValueError: it is no results file, or holds nothing to compare.
    """
    try:
        document = json.loads(source.read_text())
        rows, where = rows_of(document), document["machine"]
        lengths = [r for r in document["results"] if r["way"] == OURS and "minutes" in r]
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is no results file of `make bench` ({error!r})") from error
    shown = chosen(rows)
    if not shown:
        raise ValueError("no operator in it was measured beside a peer")
    below = 3.1 if lengths else 0.0
    above = 1.8 + len(shown) * max(0.3, 0.15 * max(len(bars_of(row)) for row in shown))
    figure = pyplot.figure(figsize=(11, above + below), layout="constrained", facecolor="white")
    top, *bottom = figure.subfigures(2, 1, height_ratios=[above, below]) if lengths else [figure]
    left, right = top.subplots(1, 2, sharey=True, width_ratios=[2, 1])
    draw_peers(left, shown)
    draw_shares(right, shown)
    if bottom:
        time, memory, threads = bottom[0].subplots(1, 3)
        across = [r for r in lengths if "threads" not in r["shape"]]
        draw_lengths(time, memory, across)
        draw_threads(threads, [r for r in lengths if "threads" in r["shape"]])
    what = where.get("gpu") or f"{where['cpu']}, {where['threads']} threads, {where['tier']}"
    commit = (where["commit"] or "unknown")[:10]
    figure.suptitle(f"hourllava_ext on {what}; torch {where['torch']}, commit {commit}", fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    pyplot.close(figure)
    write_results(target, picture.getvalue())


def chosen(rows: list[Row]) -> list[Row]:
    """What is worth a picture: the 3B shape in bfloat16, and float32 where there is nothing else, or of attention."""
    compared = [row for row in rows if row.peers]
    large = [row for row in compared if row.shape.startswith(SHAPE)]
    wide = {(row.op, row.step, row.shape) for row in large if row.dtype == "bfloat16"}

    def fits(row: Row) -> bool:
        return row.dtype == "bfloat16" or row.op == "paged_attention" or (row.op, row.step, row.shape) not in wide

    return [row for row in large if fits(row)] or compared


def bars_of(row: Row) -> dict[str, float]:
    """How many times longer than ours each peer takes; of torch's ways only the fastest, as "torch"."""
    fastest = row.fastest_of_torch()
    others = {name: times for name, times in row.peers.items() if name not in TORCH}
    return {"torch": row.peers[fastest], **others} if fastest else others


def draw_peers(axes: Axes, rows: list[Row]) -> None:
    """A bar for each peer, from 1 to how many times longer than ours it takes."""
    bars = [bars_of(row) for row in rows]
    present = {name for row in bars for name in row}
    names = [name for name in PEERS if name in present] + sorted(present - set(PEERS))
    looks = {n: PEERS.get(n, (n, OTHERS[i % len(OTHERS)])) for i, n in enumerate(names)}
    for place, times_of in enumerate(bars):
        own = [name for name in names if name in times_of]
        height = 0.8 / len(own)
        for number, name in enumerate(own):
            times, y = times_of[name], place - 0.4 + (number + 0.5) * height
            axes.barh(y, times - 1, height * 0.9, left=1, color=looks[name][1])
            axes.annotate(f"{times:.3g}", (max(times, 1), y), (3, 0), textcoords="offset points", va="center", size=6.5)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    every = [times for row in bars for times in row.values()]
    axes.set_xlim(min(0.7, min(every) / 1.2), max(every) * 2.5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title("times our time that others take", fontsize=9)
    handles = [Patch(color=looks[name][1], label=looks[name][0]) for name in names]
    axes.figure.legend(handles=handles, fontsize=8, loc="outside lower left", ncols=3, frameon=False)


def label(row: Row) -> str:
    """A row's name without what is true of all."""
    rest = row.shape.removeprefix(SHAPE).removeprefix(", ")
    return ", ".join(part for part in (f"{row.op} {row.step}", rest, row.dtype) if part)


def draw_shares(axes: Axes, rows: list[Row]) -> None:
    """How much of the machine's own rate each row reaches."""
    for place, row in enumerate(rows):
        axes.barh(place, row.share, 0.7, color=BOUNDS[row.bound.partition("_")[0]][1])
        beside = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "size": 7}
        plain = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # the line at 100 % would cross the number
        axes.annotate(f"{row.share:.0%}", (row.share, place), **beside, bbox=plain, zorder=3)
    axes.axvline(1, color="black", linewidth=1, zorder=2)
    axes.set_xlim(0, max(1.2, max(row.share for row in rows) * 1.2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title("share of the machine's own rate", fontsize=9)
    handles = [Patch(color=colour, label=name) for name, colour in BOUNDS.values()]
    axes.figure.legend(handles=handles, fontsize=8, loc="outside lower right", frameon=False)


def draw_lengths(time: Axes, memory: Axes, results: list[dict[str, Any]]) -> None:
    """Time of a question, and what it takes beyond the pages of a block, against the minutes of the video."""
    for part, name, colour in ((1, "all pages", "#1f77b4"), (16, "1/16 of the pages", "#e08214")):
        found = sorted((r for r in results if r["part"] == part), key=lambda r: r["minutes"])
        time.plot([r["minutes"] for r in found], [r["median"] * 1e3 for r in found], "o-", color=colour, label=name)
    found = sorted((r for r in results if r["part"] == 1), key=lambda r: r["minutes"])
    minutes = [r["minutes"] for r in found]
    memory.plot(minutes, [r["held_bytes"] / 2**20 for r in found], "o-", color="#555555", label="the pages of a block")
    known = [r for r in found if r["peak_bytes"] is not None]
    peaks = [max(r["peak_bytes"] / 2**20, 0.1) for r in known]
    memory.plot([r["minutes"] for r in known], peaks, "o-", color="#1f77b4", label="beyond them, while asked")
    for axes, title in ((time, "a question, 3B, one block: ms"), (memory, "its memory: MiB")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(minutes, [MINUTES.get(round(m), f"{m:g} min") for m in minutes], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.tick_params(axis="y", labelsize=8)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=7)


def draw_threads(axes: Axes, results: list[dict[str, Any]]) -> None:
    """How many times faster more threads are than one."""
    found = sorted(results, key=lambda r: r["threads"])
    threads = [r["threads"] for r in found]
    axes.plot(threads, threads, "--", color="#999999", label="in proportion")
    axes.plot(threads, [found[0]["median"] / r["median"] for r in found], "o-", color="#1f77b4", label="measured")
    axes.set_xticks(threads, [str(t) for t in threads], fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_title("threads: times one thread", fontsize=9)
    axes.legend(fontsize=7)


def main(arguments: list[str]) -> None:
    kept = sorted((ROOT / "benchmarks/results").glob("2*.json"))
    if not arguments and not kept:
        sys.exit("benchmarks: there are no results to draw; run `make bench` first")
    source = Path(arguments[0]) if arguments else kept[-1]
    target = Path(arguments[1]) if len(arguments) > 1 else source.with_suffix(".png")
    try:
        draw(source, target)
    except (OSError, ValueError) as error:
        sys.exit(f"{source}: cannot be drawn: {error}; give a JSON of benchmarks/results")
    print(target)


if __name__ == "__main__":
    main(sys.argv[1:])
