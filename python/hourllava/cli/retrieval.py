# SPDX-License-Identifier: Apache-2.0
"""`hourllava retrieval-report`: what reading a part of the memory costs in answers, and what it saves in time."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hourllava.cli.watch import check_picture
from hourllava.errors import HourLlavaError

if TYPE_CHECKING:
    from hourllava.evaluate import RetrievalReport


SHORTEST = 40  # seconds of a film in which eight events find their places


def retrieval_report(args: argparse.Namespace) -> int:
    """Measure, print a table or JSON, draw, and return the exit code.

    Raises:
        HourLlavaError: the picture cannot be written, or there is no such model.
    """
    if args.seconds < SHORTEST:
        why = f"films of {args.seconds} s have no room for what is asked of them"
        raise HourLlavaError("--seconds", why, f"give at least {SHORTEST}")
    if args.plot:
        check_picture(args.plot)
    from rich.console import Console

    from hourllava.evaluate import HourTest, measure_retrieval, report_table
    from hourllava.model import best_device, load_model

    test = HourTest(videos=args.videos, seconds=args.seconds)
    progress = args.progress or sys.stderr.isatty()
    model = load_model(args.model, device=best_device())
    report = measure_retrieval(model, test, args.folder, args.score, args.tile, progress)
    if args.plot:
        plot_retrieval(args.plot, report)
    if args.json:
        print(json.dumps(asdict(report) | {"model": args.model, "default": report.default}))
    else:
        console = Console()
        if not console.is_terminal:
            console.width = 110  # in a pipe nobody needs the terminal's
        console.print(report_table(report))
    return 0


def plot_retrieval(path: Path, report: "RetrievalReport") -> None:
    """Draw recall, agreement and right answers over the budget into a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    curves = {
        "attention recalled": [row.recall for row in report.parts],
        "answers as exact reading": [row.agreement for row in report.parts],
        "right answers": [row.right for row in report.parts],
        "time saved in MemAug": [row.saved for row in report.parts],
    }
    places = range(len(report.parts))
    for (label, values), style in zip(curves.items(), ("o-", "s-", "^-", "x:"), strict=True):
        axes.plot(places, values, style, label=label)
    axes.set_xticks(places, ["all" if row.part == 1 else f"1/{row.part}" for row in report.parts])
    axes.set_xlabel("pages read")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(f"{report.questions} questions, films: {report.films} of {report.seconds} s", fontsize=10)
    figure.savefig(path, format="png")
