# SPDX-License-Identifier: Apache-2.0
"""Answers and times for people: tables on a terminal, plain lines in a pipe."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from hourllava.model import Answer

SHOWN_MOMENTS = 3


def print_answers(questions: list[str], answers: list["Answer"]) -> None:
    """Each question with its answer and the moments that the answer rests on."""
    console = Console()
    rows = [
        (question, answer.text, ", ".join(f"{m} ({m.share:.0%})" for m in answer.moments[:SHOWN_MOMENTS]))
        for question, answer in zip(questions, answers, strict=True)
    ]
    if not console.is_terminal:
        for question, answer, moments in rows:
            print(f"{question}\n  {answer}\n  rests on {moments or 'nothing'}")
        return
    table = Table("question", "answer", "attention rests on")
    for question, answer, moments in rows:
        table.add_row(escape(question), f"[bold]{escape(answer)}[/]", moments)
    console.print(table)


def print_times(times: dict[str, float]) -> None:
    """The seconds that each stage took."""
    console = Console()
    if not console.is_terminal:
        print("\n".join(f"{stage}: {took:.2f} s" for stage, took in times.items()))
        return
    table = Table("stage", "seconds")
    table.columns[1].justify = "right"
    for stage, took in times.items():
        table.add_row(stage, f"{took:.2f}")
    console.print(table)


def print_failures(failures: list[tuple[str, str, str]]) -> None:
    """What could not be done, or not wholly: an id, what became of it, and the reason."""
    console = Console()
    if not console.is_terminal:
        print("".join(f"{id}: {state}: {reason}\n" for id, state, reason in failures), end="")
        return
    table = Table("id", "state", "reason")
    for row in failures:
        table.add_row(*map(escape, row))
    if failures:
        console.print(table)
