# SPDX-License-Identifier: Apache-2.0
"""`hourllava plan`: what a long video will take of a machine, before anything runs."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from hourllava.errors import AdmissionError, InputError

if TYPE_CHECKING:
    from hourllava.model.planning import Plan

WORDS = {
    "weights": "weights",
    "pages": "pages of keys and values",
    "question": "buffers of a question",
    "tower": "buffers of the tower while watching",
    "peak": "at the most",
    "frames": "frames between decoder and tower",
    "features": "features",
    "tokens": "visual tokens",
    "decode": "decode",
    "encode": "vision tower",
    "write": "memory",
    "watch": "to watch, one after the other",
    "first word": "to the first word of an answer",
}
UNMEASURED = "not yet measured"


def add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare `hourllava plan`."""
    parser = commands.add_parser(
        "plan",
        help="say what a video will take of device, host and disk, before anything runs",
        description=(
            "Predict bytes and time of a video that is watched with --into and --pages and asked from a pool. No "
            "weight is read."
        ),
    )
    parser.add_argument("--hours", metavar="H", required=True, help="length of the video")
    parser.add_argument("--model", default="tiny", help="3b, 7b, a preset or a model's directory (default: tiny)")
    parser.add_argument(
        "--precision",
        choices=("bfloat16", "int8"),
        default="bfloat16",
        help="of the features kept on the disk (default: bfloat16)",
    )
    parser.add_argument("--budget", metavar="SIZE", help="bytes for pages on the device, as 40GiB: do they fit?")
    parser.add_argument(
        "--measure",
        metavar="VIDEO",
        nargs="?",
        const="",
        help=(
            "time layers of the model's shapes on this machine's CPU (ten seconds, a minute for the large ones) beside "
            "decoding a video like those to come; without one, a clip of 640 x 360, 25 frames and 0.2 Mbit a second"
        ),
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan and return the exit code.

    Raises:
        HourLlavaError: there is no such model, a number is no number, or the pages do not fit into the budget.
    """
    hours = _number(args.hours)
    from hourllava.memory import format_size, parse_size
    from hourllava.model.planning import config_of, dtype_of, longest_in, plan
    from hourllava.model.watching import memory_shape

    budget = None if args.budget is None else parse_size(args.budget)
    config = config_of(args.model)
    planned = plan(args.model, hours, args.precision, config)
    times = None
    if args.measure is not None:
        from rich.console import Console

        from hourllava.model.calibration import measure

        with Console(stderr=True).status("timing layers of the model's shapes"):
            rates = measure(config, dtype_of(config), planned.queries, args.measure or None)
            times = rates.times(config, planned)
    longest = None if budget is None else longest_in(memory_shape(config, dtype_of(config)), budget)
    document = _document(planned, times, budget, longest)
    print(json.dumps(document)) if args.json else _print(document)
    if budget is not None and longest is not None and planned.device["pages"] > budget:
        why = f"its pages take {format_size(planned.device['pages'])}, the budget is {format_size(budget)}"
        raise AdmissionError(f"{hours:g} hours", why, f"raise the budget, or keep to {longest:.1f} hours")
    return 0


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"hours {text}", "that is no number", "give hours as 24 or 1.5") from error


def _document(
    planned: "Plan", times: dict[str, float] | None, budget: int | None, longest: float | None
) -> dict[str, Any]:
    seconds = None
    if times is not None:
        question = times.pop("question")
        seconds = {**times, "watch": sum(times.values()), "first word": question}
    return {
        "model": planned.model,
        "hours": planned.hours,
        "frames": planned.frames,
        "tokens": planned.tokens,
        "queries": planned.queries,
        "pages": planned.pages,
        "pages_read": planned.pages_read,
        "dtype": planned.dtype,
        "device": {**planned.device, "peak": planned.device_peak},
        "host": planned.host,
        "disk": {**planned.disk, "peak": sum(planned.disk.values())},
        "budget": budget,
        "hours_in_budget": longest,
        "seconds_on_this_cpu": seconds,
        "seconds_on_a_gpu": None,
    }


def _print(document: dict[str, Any]) -> None:
    """A table on a terminal, plain lines in a pipe."""
    from rich.console import Console
    from rich.table import Table

    from hourllava.memory import format_size

    title = (
        f"{document['hours']:g} hours with {document['model']}: {document['tokens']:,} tokens, "
        f"{document['queries']:,} of them read by the decoder, {document['dtype']}; "
        f"a question reads {document['pages_read']:,} of {document['pages']:,} pages"
    )
    rows = [
        (place, WORDS[what], format_size(n))
        for place in ("device", "host", "disk")
        for what, n in document[place].items()
    ]
    seconds = document["seconds_on_this_cpu"]
    for what in ("decode", "encode", "write", "watch", "first word"):
        rows.append(
            ("time, this CPU", WORDS[what], f"{seconds[what]:.4g} s" if seconds else f"{UNMEASURED} (--measure)")
        )
    rows.append(("time, a GPU", "all", UNMEASURED))
    if document["budget"] is not None:
        rows.append(("budget", format_size(document["budget"]), f"up to {document['hours_in_budget']:.1f} hours"))
    console = Console()
    if not console.is_terminal:
        print("\n".join([title, *(f"{place}: {what}: {value}" for place, what, value in rows)]))
        return
    table = Table("where", "for", "how much", title=title)
    table.columns[2].justify = "right"
    for number, (place, what, value) in enumerate(rows):
        first = number == 0 or rows[number - 1][0] != place
        table.add_row(
            place if first else "", what, value, end_section=number + 1 < len(rows) and rows[number + 1][0] != place
        )
    console.print(table)
