# SPDX-License-Identifier: Apache-2.0
"""`hourllava train`: a recipe by its name, with some of its fields changed."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hourllava.cli import command
from hourllava.errors import RecipeError

if TYPE_CHECKING:
    from hourllava.train import Recipe, Training


def train(name: str, arguments: list[str], output: Path | None = None) -> int:
    """Train, or print the recipe, and return the exit code.

    Args:
        name: of the recipe.
        arguments: what follows it on the command line.
        output: where to save, unless `arguments` say so.

    Raises:
        HourLlavaError: see `hourllava.train.run`.
    """
    from hourllava.train.engine import run_recipe
    from hourllava.train.overrides import change, find_recipe, show, split_arguments
    from hourllava.train.processes import leave_processes, process_rank
    from hourllava.train.runs import StoppedError

    recipe = find_recipe(name)
    if {"-h", "--help"} & set(arguments):
        print_fields(recipe)
        return command.EXIT_OK
    changes = split_arguments(["--output" if a == "-o" else a for a in arguments])
    given = changes.pop("--output", None)
    if given == "true" or (given and output):
        raise RecipeError("--output", "it names no folder" if given == "true" else "it is given twice", "give one")
    printed = changes.pop("--print", None)
    recipe = change(recipe, changes)
    if printed is not None:
        print(show(recipe))
        return command.EXIT_OK
    try:
        done = run_recipe(recipe, Path(given) if given else output or Path("build/train") / name)
        if process_rank() == 0:
            print(done)
    except StoppedError as stopped:
        if process_rank() == 0:
            print(f"hourllava: {stopped}", file=sys.stderr)
        return command.EXIT_INTERRUPTED
    finally:
        leave_processes()
    return command.EXIT_OK


def print_fields(recipe: "Recipe | Training") -> None:
    """Each field with its value and, below it, what it means."""
    from hourllava.train.overrides import meanings, settings, shown

    print(f"usage: hourllava train {recipe.name} [-o DIR] [--print] [--FIELD VALUE ...]\n\nfields and their values:")
    fields, told = settings(recipe), meanings(recipe)
    column = max(map(len, fields)) + 2
    for field, value in fields.items():
        print(f"  {field:{column}}{shown(value)}".rstrip())
        if field in told:
            print(f"      {told[field]}")
