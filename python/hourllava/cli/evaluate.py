# SPDX-License-Identifier: Apache-2.0
"""`hourllava evaluate`: the paper's benchmarks from a user's folder, or films that are rendered here."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hourllava.cli.numbers import positive
from hourllava.cli.watch import check_output
from hourllava.errors import HourLlavaError

if TYPE_CHECKING:
    from hourllava.evaluate import BenchmarkReport

BENCHMARKS = {
    "tempcompass": "TempCompass: multiple choice, yes or no, caption matching (not captioning, which needs a judge)",
    "longvideobench": "LongVideoBench: the validation split",
    "videomme": "Video-MME: short, medium and long, without subtitles or with them",
    "lvbench": "LVBench: videos of an hour and more",
}
DESCRIPTION = """\
Without a benchmark: render held-out films of one hour and measure accuracy on them.

With one: ask its questions about the videos in a folder that you have downloaded. Each video is watched once; what is
watched and what is answered is kept, and the same command goes on where it was interrupted."""
EPILOG = """\
exit codes: 0 all went well; 1 it could not be done, one line on stderr says why and what to do; 2 wrong usage;
3 done, but videos or questions were missing or damaged, as the report says; 130 interrupted."""
EXIT_OK, EXIT_LOSS = 0, 3  # as of every command
SHOWN = 5  # of the videos and questions that are lost in one way; the report lists them all


def add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare `hourllava evaluate [BENCHMARK --data DIR]`."""
    raw = argparse.RawDescriptionHelpFormatter
    evaluate = commands.add_parser(
        "evaluate",
        help="measure accuracy on benchmarks, or on rendered films of one hour",
        description=DESCRIPTION,
        formatter_class=raw,
    )
    evaluate.add_argument("--videos", metavar="N", type=positive, help="how many films to render (default: 20)")
    evaluate.add_argument("--model", default="tiny", help="a preset or a model's directory (default: tiny)")
    evaluate.set_defaults(run=_films)
    benchmarks = evaluate.add_subparsers(title="benchmarks", metavar="[BENCHMARK]")
    for name, what in BENCHMARKS.items():
        _add_benchmark(
            benchmarks.add_parser(name, help=what, description=what, epilog=EPILOG, formatter_class=raw), name
        )


def _add_benchmark(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--data", metavar="DIR", type=Path, required=True, help="the benchmark's files and videos, as downloaded"
    )
    parser.add_argument("--model", default=argparse.SUPPRESS, help="a preset or a model's directory (default: tiny)")
    if name in ("videomme", "longvideobench"):
        parser.add_argument("--subtitles", action="store_true", help="put its subtitles before each question")
        parser.add_argument(
            "--subtitle-frames",
            metavar="N",
            type=positive,
            help="only lines on screen at N seconds spread evenly, as models that see N pictures do (default: all)",
        )
    parser.add_argument("--budget", metavar="SIZE", help="as in `hourllava ask` (default: what the model says)")
    parser.add_argument(
        "--memories",
        metavar="REPOSITORY",
        type=Path,
        default=Path("build/evaluate/memories"),
        help="where what is watched is kept (default: build/evaluate/memories)",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="JSON",
        type=Path,
        help=f"the report; answers go beside it (default: build/evaluate/{name}.json)",
    )
    parser.add_argument("--progress", action="store_true", help="show the progress bar even if stderr is no terminal")
    parser.set_defaults(run=_benchmark, benchmark=name, subtitles=False, subtitle_frames=None)


def _films(args: argparse.Namespace) -> int:
    from hourllava.evaluate import main

    return main(videos=args.videos or 20, model=args.model)


def _benchmark(args: argparse.Namespace) -> int:
    """Ask, write the report, print it, and return the exit code.

    Raises:
        HourLlavaError: there is nothing to ask, or nothing can be written.
    """
    if args.videos is not None:
        raise HourLlavaError("--videos", "it is for rendered films", "leave it out: a benchmark asks about all its own")
    if args.subtitle_frames is not None and not args.subtitles:
        raise HourLlavaError("--subtitle-frames", "it says which subtitles are read", "give --subtitles, too")
    suffix = "-subtitles" if args.subtitles else ""
    output = args.output or Path("build/evaluate", f"{args.benchmark}{suffix}.json")
    if args.output is None:
        output.parent.mkdir(parents=True, exist_ok=True)
    check_output(output)
    from hourllava.evaluate import BENCHMARKS, DataFolder, RunOptions, run_benchmark
    from hourllava.evaluate.running import versions, write_json
    from hourllava.model import best_device, load_model
    from hourllava.model.budget import as_budget

    if args.budget is not None:
        as_budget(args.budget)  # a wrong one shows before anything is loaded
    folder = DataFolder(args.data)
    model = load_model(args.model, device=best_device())
    options = RunOptions(args.subtitles, args.subtitle_frames, args.budget)
    answers = output.with_suffix(".answers.jsonl")
    progress = args.progress or sys.stderr.isatty()
    report = run_benchmark(model, BENCHMARKS[args.benchmark], folder, args.memories, answers, options, progress)
    found = {"model": args.model, "device": str(model.device), "versions": versions(), "answers": answers.name}
    write_json(output, {**report.to_dict(), **found})
    print_report(report, folder.packed)
    print(f"report: {output}; every answer: {answers}")
    return EXIT_LOSS if report.lost else EXIT_OK


def print_report(report: "BenchmarkReport", packed: str) -> None:
    """The table of a report, and a line for each kind of loss.

    Args:
        packed: what may still have to be unpacked, in a few words.
    """
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 110  # in a pipe nobody needs the terminal's
    console.print(_table(report))
    lost = report.lost
    if lost.missing:
        names = ", ".join(lost.missing[:SHOWN]) + (", ..." if len(lost.missing) > SHOWN else "")
        print(f"missing videos, {len(lost.missing)}: {names}" + (f" ({packed})" if packed else ""))
    kinds = ("could not be asked about", lost.unreadable), ("damaged, asked about what is left", lost.damaged)
    for what, reasons in (*kinds, ("not asked", lost.refused)):
        for name, reason in list(reasons.items())[:SHOWN]:
            print(f"{name}: {what}: {reason}")
        if len(reasons) > SHOWN:
            print(f"{len(reasons) - SHOWN} more: {what}, as the report says")


def _table(report: "BenchmarkReport") -> Any:
    from rich.markup import escape
    from rich.table import Table

    missing = report.videos - report.available
    title = f"{report.title}: {report.available} of {report.videos} videos available, {missing} missing"
    if report.bare is not None:
        title += f", {len(report.bare)} without subtitles"
    table = Table(title=escape(title), title_justify="left")
    table.caption = f"{report.scores.total.asked} of {report.questions} questions asked"
    for heading in ("", "questions", "right", "right %", "95 % interval", "unread"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = [("all", report.scores.total)]
    for breakdown, values in report.scores.breakdowns.items():
        rows += [(f"{breakdown}: {value}", score) for value, score in values.items()]
    for name, score in rows:
        span = score.interval()
        shown = f"{100 * span[0]:.1f}-{100 * span[1]:.1f}" if span else ""
        percent = "" if score.accuracy is None else f"{100 * score.accuracy:.1f}"
        table.add_row(escape(name), str(score.asked), str(score.right), percent, shown, str(score.unread))
    return table
