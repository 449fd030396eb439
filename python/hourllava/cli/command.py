# SPDX-License-Identifier: Apache-2.0
"""Reads the command line, runs one subcommand, and turns what went wrong into one line and an exit code.

Nothing heavy is imported before a subcommand runs, so that help and usage errors come at once.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hourllava.cli.embed import add_embed
from hourllava.cli.evaluate import add_evaluate
from hourllava.cli.memory import add_memory
from hourllava.cli.numbers import positive
from hourllava.cli.plan import add_plan
from hourllava.cli.serve import add_serve
from hourllava.cli.shards import add_shards
from hourllava.errors import HourLlavaError

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_LOSS, EXIT_INTERRUPTED, EXIT_PIPE = 0, 1, 2, 3, 130, 141
EPILOG = """\
exit codes: 0 all went well; 1 it could not be done, one line on stderr says why and what to do; 2 wrong usage;
3 done, but part of the video could not be read, as one line on stderr says; 130 interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; usage errors exit with 2, as argparse does."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed, and the next file to be opened would take its place
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a name or question in another encoding is no reason to fail
    try:
        try:
            args = _parser().parse_args(argv)
            return args.run(args)
        finally:
            sys.stdout.flush()  # a reader that has gone away shows here and not at exit
    except HourLlavaError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("hourllava: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except OSError as error:
        what = error.filename or "system"
        return _fail(f"{what}: {error.strerror or error}; free some space, or check the path and its permissions")
    except MemoryError:
        return _fail("memory: this machine has too little for it; close other programs, or use a shorter video")
    except ImportError as error:
        return _fail(f"{' '.join(str(error).split())}; `hourllava doctor` says what is missing")


def _fail(line: str) -> int:
    print(f"hourllava: {line}", file=sys.stderr)
    return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "hourllava", description="Ask questions about hour-long video.", epilog=EPILOG, formatter_class=raw
    )
    parser.add_argument("--version", action="version", version=f"hourllava {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_ask(commands)
    _add_watch(commands)
    add_serve(commands)
    add_memory(commands)
    add_embed(commands)
    add_shards(commands)
    add_plan(commands)
    _add_train(commands)
    add_evaluate(commands)
    _add_retrieval_report(commands)
    _add_convert(commands)
    doctor = commands.add_parser("doctor", help="say what is installed, which kernels are live, and what is missing")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_ask(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    ask = commands.add_parser(
        "ask",
        help="answer questions about a video",
        epilog=EPILOG,
        description=(
            "Watch a video once and answer questions about it: each answer with the moments its attention rests on."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ask.add_argument("video", metavar="VIDEO", type=Path, help="a video file, a memory, or REPOSITORY/NAME")
    ask.add_argument("questions", metavar="QUESTION", nargs="+", help="what to ask")
    ask.add_argument(
        "--subtitles", metavar="FILE", type=Path, help="subtitles (SRT or WebVTT) that are put before each question"
    )
    ask.add_argument("--plot", metavar="PNG", type=Path, help="draw attention over time into this file")
    ask.add_argument(
        "--evidence", metavar="PNG", type=Path, help="put the pictures of each answer's top moments into this file"
    )
    ask.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    ask.add_argument(
        "--budget",
        metavar="SIZE",
        help="read no more of the memory than this: 128p (pages), 60s, 1/16, 1/16,32p (32 pages at least) or "
        "all (default: what the model says)",
    )
    _add_choices(ask)
    ask.add_argument(
        "--keep",
        metavar="FROM-TO",
        type=_span,
        action="append",
        default=[],
        help="with --budget: read these seconds whatever their score, as 12:04-12:30",
    )
    _add_model(ask)
    _add_progress(ask)
    ask.set_defaults(run=_ask)


def _add_watch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    watch = commands.add_parser(
        "watch",
        help="watch a video and save its memory",
        epilog=EPILOG,
        description=(
            "Watch a video once and save its memory; `hourllava ask MEMORY QUESTION...` answers without the video. "
            "A memory in a repository can be asked while it grows."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    watch.add_argument("video", metavar="VIDEO", help="a video file; with --follow, a stream's address, too")
    watch.add_argument(
        "--follow",
        action="store_true",
        help="go on with a file that grows or a stream (rtsp://, http://, ...) until Ctrl-C, or until it is idle",
    )
    watch.add_argument(
        "--idle",
        metavar="SECONDS",
        type=positive,
        default=30,
        help="with --follow: a source that gives nothing for so long has ended (default: 30)",
    )
    where = watch.add_mutually_exclusive_group(required=True)
    where.add_argument("-o", "--output", metavar="MEMORY", type=Path, help="the file to write")
    where.add_argument("--into", metavar="REPOSITORY", type=Path, help="a directory of memories to add it to")
    watch.add_argument(
        "--name", help="what to call it there (default: the file's name); goes on with one begun earlier"
    )
    watch.add_argument(
        "--precision",
        choices=("bfloat16", "int8"),
        default="bfloat16",
        help="of the features kept there (default: bfloat16)",
    )
    watch.add_argument("--pages", action="store_true", help="keep ready pages there, so that it reopens at once")
    _add_model(watch)
    _add_progress(watch)
    watch.set_defaults(run=_watch)


def _add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    train = commands.add_parser(
        "train",
        help="train a model by a recipe",
        epilog=EPILOG,
        description=(
            "Train by a recipe. A run that the output folder holds already goes on where it stopped; SIGTERM saves "
            "before it ends the run. Under torchrun, all processes train together."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument(
        "recipe", metavar="RECIPE", help="`tiny` is the model in the package; s1-3b ... s3-7b the paper's"
    )
    changes = train.add_argument(
        "changes",
        metavar="--FIELD VALUE",
        nargs=argparse.REMAINDER,
        help="another value for a field of the recipe, or of a stage of `tiny` (--s2.grounding 0.5); --print shows all "
        "of it and trains nothing, --help says what it means; "
        "-o DIR, --output DIR is where to save (default: build/train/RECIPE)",
    )
    changes.required = False  # or where RECIPE is missing, some releases of Python ask for a change, too
    train.add_argument("-o", "--output", metavar="DIR", type=Path, help=argparse.SUPPRESS)
    train.set_defaults(run=_train)


def _add_retrieval_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    report = commands.add_parser(
        "retrieval-report",
        help="measure what reading a part of the memory costs and saves",
        description=(
            "Ask the questions of held-out films with budgets of 1/2 to 1/64 of the pages, and compare attention, "
            "answers and time with reading all of them. From 300 questions on (13 films), a default budget follows."
        ),
    )
    report.add_argument("--videos", metavar="N", type=positive, default=20, help="how many films (default: 20)")
    report.add_argument(
        "--seconds", metavar="N", type=positive, default=3600, help="how long each film is (default: 3600)"
    )
    _add_choices(report)
    report.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    report.add_argument("--plot", metavar="PNG", type=Path, help="draw the curves into this file")
    report.add_argument(
        "--folder",
        metavar="DIR",
        type=Path,
        default=Path("build/evaluate"),
        help="where films and their features are kept (default: build/evaluate)",
    )
    _add_model(report)
    _add_progress(report)
    report.set_defaults(run=_retrieval_report)


def _add_convert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    convert = commands.add_parser(
        "convert",
        help="write a model in the original's layout, or its decoder alone",
        description=(
            "Write a model as the original's code reads it: its names, its shapes, its config.json, bit for bit. "
            "The other way needs no conversion: --model takes the original's checkpoints as they are."
        ),
    )
    convert.add_argument(
        "--decoder", action="store_true", help="write the decoder alone, a Qwen2 that vLLM and transformers know"
    )
    convert.add_argument("model", metavar="MODEL", help="a preset or a model's directory")
    convert.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="a new folder")
    convert.add_argument(
        "--vision-tower", metavar="DIR", type=Path, help="the tower's own repository, if MODEL holds no tower"
    )
    convert.set_defaults(run=_convert)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help="a preset or a model's directory (default: tiny)")


def _add_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--progress", action="store_true", help="show the progress bar even if stderr is no terminal")


def _add_choices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--score",
        choices=("both", "content", "rotated"),
        default="both",
        help="what pages are chosen by: content, place (rotated) or both (default: both)",
    )
    parser.add_argument(
        "--tile", metavar="ROWS", type=positive, help="let every so many query rows choose their own pages"
    )


def _span(text: str) -> tuple[float, float]:
    from hourllava.video import seconds_of_clock

    start, _, end = text.partition("-")
    try:
        span = seconds_of_clock(start), seconds_of_clock(end)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no span of time, write 12:04-12:30") from error
    return span


def _version() -> str:
    try:
        return version("hourllava")
    except PackageNotFoundError:
        return "(not installed)"


def _ask(args: argparse.Namespace) -> int:
    from hourllava.cli.ask import AskRequest, ask

    progress = args.progress or sys.stderr.isatty()
    questions = [question.encode(errors="replace").decode() for question in args.questions]
    budget = args.budget
    if budget is None or budget == "all":
        if args.keep or args.tile or args.score != "both":
            raise HourLlavaError("--keep, --tile and --score", "they choose what a budget reads", "give --budget, too")
    else:
        from hourllava.model import Budget

        budget = replace(Budget.parse(budget), mode=args.score, tile=args.tile, keep=tuple(args.keep))
    request = AskRequest(
        video=args.video,
        questions=questions,
        model=args.model,
        plot=args.plot,
        evidence=args.evidence,
        json=args.json,
        progress=progress,
        subtitles=args.subtitles,
        budget=budget,
    )
    return EXIT_LOSS if ask(request) else EXIT_OK


def _watch(args: argparse.Namespace) -> int:
    from hourllava.cli.watch import stopping, watch, watch_into
    from hourllava.memory.repository import check_name
    from hourllava.video import LiveReader, is_url, without_secrets

    progress = args.progress or sys.stderr.isatty()
    if is_url(args.video) and not args.follow:
        raise HourLlavaError(without_secrets(args.video), "it is an address and no file", "add --follow")
    if args.into is None and (args.name or args.pages or args.precision != "bfloat16"):
        why, todo = "they say how a repository keeps a video", "give --into and no --output"
        raise HourLlavaError("--name, --pages and --precision", why, todo)
    if is_url(args.video) and args.into is not None and args.name is None:
        raise HourLlavaError(without_secrets(args.video), "a stream has no file's name to be called by", "add --name")
    with stopping() if args.follow else nullcontext() as stop:
        video = LiveReader(args.video, args.idle, stop) if args.follow else Path(args.video)
        if args.into is None:
            lost = watch(video, args.output, args.model, progress)
        else:
            name = Path(args.video).stem if args.name is None else args.name
            check_name(name)
            lost = watch_into(args.into / name, video, args.model, args.precision, args.pages, progress)
    return EXIT_LOSS if lost else EXIT_OK


def _train(args: argparse.Namespace) -> int:
    from hourllava.cli.train import train

    return train(args.recipe, args.changes, args.output)


def _retrieval_report(args: argparse.Namespace) -> int:
    from hourllava.cli.retrieval import retrieval_report

    return retrieval_report(args)


def _convert(args: argparse.Namespace) -> int:
    from hourllava.model import convert_decoder, convert_to_original
    from hourllava.model.checkpoint import read_config
    from hourllava.model.loading import model_folder
    from hourllava.model.original import untold_fields

    folder = model_folder(args.model)
    if args.decoder:
        files = convert_decoder(folder, args.output, args.vision_tower)
        print(f"{args.output}: config.json and {', '.join(files)} of a Qwen2")
        return EXIT_OK
    files = convert_to_original(folder, args.output, args.vision_tower)
    print(f"{args.output}: config.json and {', '.join(files)} in the original's layout")
    untold = untold_fields(read_config(folder))
    if untold:
        other = ", ".join(f"{name} {then} (here {now})" for name, (now, then) in untold.items())
        given = ", ".join(f"{name}={now!r}" for name, (now, _) in untold.items())
        print(f"The original's code has constants that differ from this model's config: {other}")
        print(f"To read it again as it is here: from_pretrained({str(args.output)!r}, {given})")
    return EXIT_OK


def _doctor(args: argparse.Namespace) -> int:
    from hourllava.cli.doctor import doctor

    return EXIT_OK if doctor() else EXIT_ERROR
