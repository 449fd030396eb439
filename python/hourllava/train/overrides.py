# SPDX-License-Identifier: Apache-2.0
"""Recipes as text: fields changed from a command line, shown, saved beside what they made, and compared with it."""

import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from hourllava.errors import RecipeError
from hourllava.train.recipes import PARTS, RECIPES, Lesson, Recipe, Stage, Training

RECIPE_FILE = "recipe.json"
CHOICES = {
    "batching": ("random", "per_stream"),
    "parallel": ("ddp", "zero2", "zero3", "fsdp2"),
    "spatial_forgetting": ("random", "uniform"),
    "schedule": ("cosine", "linear", "constant", "constant_with_warmup"),
    "trains": tuple(PARTS),
    "report_to": ("tensorboard", "wandb", "none"),
}
# Fields that may differ from those of the checkpoint that a run goes on from.
FREE = {"--workers", "--failure-limit", "--save-steps", "--keep", "--report-to", "--parallel"}
_FROM_ONE = {"batch_size", "batch_per_device", "memory_parallel", "save_steps", "keep", "tower_steps", "event_weight"}
_FROM_ONE |= {"film_size", "max_length", "lora_alpha", "memaug_depth", "image_grid", "image_max_tiles"}
_BELOW = {"adam_beta1": 1, "adam_beta2": 1, "warmup_ratio": 1, "seed": 2**32}
_LISTED = 5  # fields that a line names at most
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")

Kind = TypeVar("Kind", bound=Recipe | Training)
Made = TypeVar("Made")


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
        changes: by the field's name, with dashes or underscores, what the command line gives; `settings` has the names.

    Raises:
        RecipeError: there is no such field, or the value does not fit it.
    """
    known = _known(recipe)
    values: dict[int, dict[str, Any]] = {}
    for given, text in changes.items():
        name = flag(given.lstrip("-"))
        if name not in known:
            why = f"recipe {recipe.name} has no such field"
            raise RecipeError(name, why + _nearest(name, known), "see them all with --print")
        owner, field = known[name]
        values.setdefault(id(owner), {})[field.name] = _value(name, field, text)
    own: dict[str, Any] = values.get(id(recipe), {})
    if isinstance(recipe, Recipe):
        own["stages"] = tuple(replace(stage, **values.get(id(stage), {})) for stage in recipe.stages)
    return replace(recipe, **own)


def settings(recipe: Recipe | Training) -> dict[str, Any]:
    """The value of everything that can be changed, by its flag; those of stages look like `--s2.grounding`."""
    return {name: getattr(owner, field.name) for name, (owner, field) in _known(recipe).items()}


def meanings(recipe: Recipe | Training) -> dict[str, str]:
    """What fields mean, by the flag; of a field that every stage has, by that of the first."""
    firsts: dict[str, tuple[str, Field]] = {}
    for name, (_, field) in _known(recipe).items():
        firsts.setdefault(field.name, (name, field))
    choices = {field: f" ({', '.join(CHOICES[field])})" if field in CHOICES else "" for field in firsts}
    return {name: field.metadata["meaning"] + choices[field.name] for name, field in firsts.values()}


def _known(recipe: Recipe | Training) -> dict[str, tuple[Recipe | Training | Stage, Field]]:
    owners: list[tuple[str, Recipe | Training | Stage]] = [("", recipe)]
    if isinstance(recipe, Recipe):
        owners += [(f"{stage.name}.", stage) for stage in recipe.stages]
    return {
        flag(prefix + field.name): (owner, field)
        for prefix, owner in owners
        for field in fields(owner)
        if field.name not in ("name", "stages")
    }


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


def load_recipe(path: Path) -> Recipe | Training:
    """A recipe that was saved.

    Raises:
        RecipeError: the file is missing, damaged, or holds other fields.
    """
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecipeError(path, f"it cannot be read ({error})", "start again in another folder") from error
    try:
        return _made(Recipe, told) if "stages" in told else _made(Training, told)
    except (TypeError, ValueError) as error:
        what = f"it does not hold what this version knows as a recipe ({error})"
        raise RecipeError(path, what, "start again in another folder") from error


def check_same(recipe: Recipe | Training, saved: Recipe | Training, where: Path) -> None:
    """Raise RecipeError if a run by `saved` cannot be gone on with by `recipe`."""
    now, before = ({"the name": one.name, **settings(one)} for one in (recipe, saved))
    other = [name for name in now | before if now.get(name) != before.get(name) and name not in FREE]
    if other:
        differs = ", ".join(
            f"{name} was {shown(before.get(name))} and is {shown(now.get(name))}" for name in other[:_LISTED]
        )
        more = f", and {len(other) - _LISTED} more" if len(other) > _LISTED else ""
        raise RecipeError(
            where, f"it was begun by another recipe: {differs}{more}", "give the same values, or another -o"
        )


def shown(value: Any) -> str:
    """A field's value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(shown, value))
    return f"{value.seconds}x{value.steps}x{value.batch}" if isinstance(value, Lesson) else str(value)


def _made(kind: type[Made], told: Any) -> Made:
    """A dataclass of what JSON tells; a ValueError names the fields that are missing or unknown."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    needed = {field.name for field in fields(kind) if field.default is MISSING}  # type: ignore[arg-type]
    wrong = sorted(set(told) - known | needed - set(told)) if isinstance(told, dict) else ["no JSON object"]
    if wrong:
        raise ValueError(", ".join(wrong))
    parts = {"stages": Stage, "lessons": Lesson}
    values = {
        name: tuple(_made(parts[name], one) if name in parts else one for one in value)
        if isinstance(value, list)
        else value
        for name, value in told.items()
    }
    return kind(**values)


def _value(name: str, field: Field, text: str) -> Any:
    """`text` as a field's type, which is named as the source names it; `name`: the flag it is given by."""
    kind = str(field.type)
    listed = [part.strip() for part in text.split(",") if part.strip()]
    try:
        if "Lesson" in kind:
            value: Any = tuple(_lesson(part) for part in listed)
        elif kind.startswith("tuple"):
            value = tuple(listed)
        elif "bool" in kind:
            if text.lower() not in (*_TRUE, *_FALSE):
                raise ValueError
            value = text.lower() in _TRUE
        else:
            value = int(text) if "int" in kind else float(text) if "float" in kind else text
    except (TypeError, ValueError) as error:
        wanted = {"b": "true or false", "i": "a whole number", "f": "a number", "t": "SECONDSxSTEPSxBATCH, by commas"}
        first = kind.replace("<class '", "")[0]
        raise RecipeError(name, f"{text!r} does not fit", f"give {wanted[first]}") from error
    if value == ():
        raise RecipeError(name, "it names nothing", "name some, by commas")
    if isinstance(value, int | float):
        _check_number(name, field.name, value)
    several = text.split(",") if field.name == "report_to" else (value,)
    for chosen in value if isinstance(value, tuple) else several:
        if field.name in CHOICES and chosen not in CHOICES[field.name]:
            why = f"there is no {chosen!r}" + _nearest(chosen, CHOICES[field.name])
            raise RecipeError(name, why, f"choose from {', '.join(CHOICES[field.name])}")
    return value


def _check_number(name: str, field: str, value: float) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(name, f"{value} is no number to count with", "give another")
    if value < 0:
        raise RecipeError(name, f"{value} is below zero", "give a number from 0 on")
    if not value and (field in _FROM_ONE or field == "epochs"):
        raise RecipeError(name, f"{value} is none at all", "give a number above 0")
    if value >= _BELOW.get(field, math.inf):
        raise RecipeError(name, f"{value} is too large", f"give a number below {_BELOW[field]}")


def _lesson(text: str) -> Lesson:
    lesson = Lesson(*map(int, text.split("x")))
    if min(lesson.seconds, lesson.steps, lesson.batch) < 1:
        raise ValueError
    return lesson


def _nearest(name: str, known: Any) -> str:
    near = get_close_matches(name, list(known), 1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""
