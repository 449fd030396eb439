# SPDX-License-Identifier: Apache-2.0
"""Recipes as text: fields changed from a command line, shown, saved beside what they made, and compared with it."""

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from hourllava.errors import RecipeError
from hourllava.train.recipes import PARTS, RECIPES, Recipe, Training

RECIPE_FILE = "recipe.json"
CHOICES = {
    "batching": ("random", "per_stream"),
    "parallel": ("ddp", "zero2", "zero3", "fsdp2"),
    "spatial_forgetting": ("random", "uniform"),
    "schedule": ("cosine", "linear", "constant", "constant_with_warmup"),
    "trains": tuple(PARTS),
}
# Fields that may differ from those of the checkpoint that a run goes on from.
FREE = {"workers", "failure_limit", "save_steps", "keep", "report_to", "parallel"}
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")

Kind = TypeVar("Kind", bound=Recipe | Training)


def find_recipe(name: str) -> Recipe | Training:
    """The recipe of that name.

    Raises:
        RecipeError: there is none.
    """
    if name not in RECIPES:
        why = "there is no such recipe"
        raise RecipeError(f"recipe {name!r}", why + _nearest(name, RECIPES), f"choose from: {', '.join(RECIPES)}")
    return RECIPES[name]()


def change(recipe: Kind, changes: dict[str, str]) -> Kind:
    """The recipe with other values in some of its fields.

    Args:
        changes: by the field's name, with dashes or underscores, what the command line gives.

    Raises:
        RecipeError: there is no such field, or the value does not fit it.
    """
    known = {field.name: field.type for field in fields(recipe) if field.name not in ("name", "stages")}
    values = {}
    for given, text in changes.items():
        name = given.lstrip("-").replace("-", "_")
        if name not in known:
            why = f"recipe {recipe.name} has no such field"
            flags = {flag(field): field for field in known}
            raise RecipeError(flag(name), why + _nearest(flag(name), flags), "see them all with --print")
        values[name] = _value(name, str(known[name]), text)
    return replace(recipe, **values)


def split_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """`--field value`, `--field=value` and, for what is true or false, `--field`, as a dictionary.

    Raises:
        RecipeError: a value stands alone, or a field comes twice.
    """
    found: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or len(name) < 3:
            raise RecipeError(f"argument {name!r}", "it belongs to no field", "write --FIELD VALUE")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        if name in found:
            raise RecipeError(name, "it is given twice", "give it once")
        found[name] = value
    return found


def flag(field: str) -> str:
    """How a field is written on the command line."""
    return "--" + field.replace("_", "-")


def show(recipe: Recipe | Training) -> str:
    """The whole recipe as JSON, as it is saved."""
    return json.dumps(asdict(recipe), indent=2)


def load_recipe(path: Path) -> Training:
    """A recipe that was saved.

    Raises:
        RecipeError: the file is missing, damaged, or holds other fields.
    """
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecipeError(path, f"it cannot be read ({error})", "start again in another folder") from error
    names = {field.name for field in fields(Training)}
    needed = {field.name for field in fields(Training) if field.default is MISSING}
    wrong = sorted(set(told) - names | needed - set(told)) if isinstance(told, dict) else ["a JSON object"]
    if wrong:
        what = f"it does not hold what this version knows as a recipe ({', '.join(wrong)})"
        raise RecipeError(path, what, "start again in another folder")
    return Training(**{**told, "trains": tuple(told["trains"])})


def check_same(recipe: Training, saved: Training, where: Path) -> None:
    """Raise RecipeError if a run by `saved` cannot be gone on with by `recipe`."""
    now, before = asdict(recipe), asdict(saved)
    other = [name for name in now if now[name] != before[name] and name not in FREE]
    if other:
        differs = ", ".join(f"{flag(name)} was {before[name]} and is {now[name]}" for name in other)
        raise RecipeError(where, f"it was begun by another recipe: {differs}", "give the same values, or another -o")


def _value(name: str, kind: str, text: str) -> Any:
    """`text` as a field's type, which is named as the source names it."""
    try:
        if kind.startswith("tuple"):
            value: Any = tuple(part.strip() for part in text.split(",") if part.strip())
        elif "bool" in kind:
            if text.lower() not in (*_TRUE, *_FALSE):
                raise ValueError
            return text.lower() in _TRUE
        else:
            value = int(text) if "int" in kind else float(text) if "float" in kind else text
    except ValueError as error:
        wanted = {"b": "true or false", "i": "a whole number", "f": "a number"}[kind.replace("<class '", "")[0]]
        raise RecipeError(flag(name), f"{text!r} does not fit", f"give {wanted}") from error
    if isinstance(value, int | float) and not value >= 0:
        raise RecipeError(flag(name), f"{text} is below zero", "give a number from 0 on")
    if name in ("batch_size", "batch_per_device", "memory_parallel", "save_steps", "keep") and value < 1:
        raise RecipeError(flag(name), f"{text} is none at all", "give a whole number above 0")
    for chosen in value if isinstance(value, tuple) else (value,):
        if name in CHOICES and chosen not in CHOICES[name]:
            why = f"there is no {chosen!r}" + _nearest(chosen, CHOICES[name])
            raise RecipeError(flag(name), why, f"choose from {', '.join(CHOICES[name])}")
    return value


def _nearest(name: str, known: Any) -> str:
    near = get_close_matches(name, list(known), 1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""
