# SPDX-License-Identifier: Apache-2.0
"""What every training goes through: a folder that it may use, steps up to the last, and a model that is put there."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError
from torch import distributed as dist
from transformers import PrinterCallback, ProgressCallback

from hourllava.errors import RecipeError
from hourllava.model import HourLlavaForConditionalGeneration
from hourllava.model.checkpoint import own_report
from hourllava.train.overrides import RECIPE_FILE, check_same, load_recipe, show
from hourllava.train.processes import process_count, process_rank
from hourllava.train.recipes import Recipe, Training
from hourllava.train.report import Bar
from hourllava.train.resume import check_sharing, checkpoints, clear, failed_save
from hourllava.train.trainer import VideoTrainer
from hourllava.train.zero import uses_zero

GO_ON = "the same command goes on from it"
_FINAL_PART = ".model.part"


class StoppedError(RecipeError):
    """A run was asked to end, and has saved."""


def is_done(recipe: Recipe | Training, out_dir: Path) -> bool:
    """Whether ``out_dir`` holds what the recipe makes.

    Raises:
        RecipeError: it holds what another one made.
    """
    if not (out_dir / RECIPE_FILE).exists():
        return False
    check_same(recipe, load_recipe(out_dir / RECIPE_FILE), out_dir)
    return True


def prepare_folder(recipe: Recipe | Training, out_dir: Path) -> Path | None:
    """The checkpoint to go on from, if there is one.

    Raises:
        RecipeError: it was made by another recipe, or ``out_dir`` cannot be written.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        found = checkpoints(out_dir)
    except OSError as error:
        raise RecipeError(f"output {out_dir}", f"it cannot be written ({error.strerror})", "give another -o") from error
    if process_count() > 1:
        dist.barrier()  # before the first process clears up, all have seen the same
    if process_rank() == 0:
        clear(out_dir)
    if found:
        saved = load_recipe(found[-1] / RECIPE_FILE)
        check_same(recipe, saved, found[-1])
        if isinstance(recipe, Training) and isinstance(saved, Training):
            check_sharing(found[-1], recipe.parallel, saved.parallel, process_count())
    return found[-1] if found else None


def check_packages(recipe: Training) -> None:
    """Raise RecipeError if the recipe asks for a package that is not installed."""
    needed = {name: ("--report-to", name) for name in recipe.report_to.split(",") if name != "none"}
    if uses_zero(recipe):
        needed["deepspeed"] = "--parallel", "'hourllava[zero]'"
    for name, (flag, source) in needed.items():
        found = find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, as W&B leaves behind, is no package
            raise RecipeError(flag, f"{name} is not installed", f"pip install {source}, or choose another")


def go(trainer: VideoTrainer, out_dir: Path, begun: Path | None) -> None:
    """Train to the last step, from the checkpoint that a run goes on from.

    Raises:
        StoppedError: SIGTERM came; the last step is saved.
    """
    trainer.remove_callback(PrinterCallback if trainer.args.disable_tqdm else ProgressCallback)
    bar = Bar()
    if not trainer.args.disable_tqdm:
        trainer.add_callback(bar)
    try:
        trainer.train(resume_from_checkpoint=str(begun) if begun else None)
    finally:
        bar.end()  # so that what is said of an error begins a line
    if trainer.state.global_step < trainer.state.max_steps:
        last = checkpoints(out_dir)[-1].name
        raise StoppedError(out_dir, f"the run was asked to end; {last} is saved", GO_ON)


def install(model: HourLlavaForConditionalGeneration, recipe: Recipe | Training, out_dir: Path) -> None:
    """Put a model into ``out_dir``, and the recipe last: where it is, all is there.

    Raises:
        RecipeError: it cannot be written; what was there is as it was.
    """
    part = out_dir / _FINAL_PART
    shutil.rmtree(part, ignore_errors=True)
    try:
        with own_report():
            model.save_pretrained(part)
        (part / RECIPE_FILE).write_text(show(recipe) + "\n")
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise failed_save(error, out_dir, "model.safetensors") from error
    for path in sorted(part.iterdir(), key=lambda path: path.name == RECIPE_FILE):
        os.replace(path, out_dir / path.name)
    part.rmdir()
