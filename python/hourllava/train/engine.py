# SPDX-License-Identifier: Apache-2.0
"""Run a recipe: one of the paper's stages, or `tiny`, whose stages are trainings on films that follow each other."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from hourllava.data.tokenizer import build_tokenizer
from hourllava.errors import RecipeError
from hourllava.model import HourLlavaForConditionalGeneration
from hourllava.model.checkpoint import copy_tensors
from hourllava.model.configuration import tiny_config
from hourllava.model.parts import parts_table
from hourllava.train.film_trainer import Batches, FilmTrainer, Objective, answer_questions
from hourllava.train.films import Lessons
from hourllava.train.groups import choose_parameters, learning_rates
from hourllava.train.overrides import find_recipe
from hourllava.train.processes import join_processes, process_count
from hourllava.train.recipes import Recipe, Training
from hourllava.train.report import PICTURE, Picture, draw
from hourllava.train.resume import SaveBeforeEnd, checkpoints, on_sigterm
from hourllava.train.runs import GO_ON, StoppedError, check_packages, go, install, is_done, prepare_folder
from hourllava.train.tower import LabelledFrames, add_naming, finish_tower, name_frames
from hourllava.train.trainer import TRAINED
from hourllava.train.training import train, training_arguments

TOWER = "tower"  # the stage before the recipe's own
_TOWER_RATE = 2e-3
_LAST_RATE = 0.05  # of the highest


@dataclass(frozen=True)
class _Course:
    """What a stage comes to: a training, with its model, data, and what is learned from them."""

    training: Training
    warmup_steps: int
    model: HourLlavaForConditionalGeneration
    batches: Batches
    objective: Objective
    finish: Callable[[], None] = lambda: None


def run(recipe_name: str, out_dir: str | Path) -> Path:
    """Train ``recipe_name`` into ``out_dir``; a run that was begun there goes on.

    Raises:
        RecipeError: there is no such recipe, or ``out_dir`` cannot be written or belongs to another one.
        StoppedError: SIGTERM came; the last step is saved.
    """
    return run_recipe(find_recipe(recipe_name), Path(out_dir))


def run_recipe(recipe: Recipe | Training, out_dir: Path) -> Path:
    """Train by a recipe into ``out_dir``; see `run`, and `training.train` for one of the paper's stages."""
    if isinstance(recipe, Training):
        return train(recipe, out_dir)
    join_processes()
    if process_count() > 1:
        raise RecipeError(f"recipe {recipe.name}", "its stages run on one process", "start it without torchrun")
    if is_done(recipe, out_dir):
        return out_dir
    folders = [out_dir / name for name in (TOWER, *(stage.name for stage in recipe.stages))]
    with on_sigterm() as asked:
        for number, folder in enumerate(folders):
            if not is_done(recipe.until(number), folder):
                course = _stage(recipe, number, folders[number - 1]) if number else _tower(recipe)
                _run_stage(course, recipe.until(number), folder, SaveBeforeEnd(asked))
            if asked.is_set():
                raise StoppedError(out_dir, f"the run was asked to end; stage {folder.name} is saved", GO_ON)
    _draw_stages(folders, out_dir / PICTURE)
    install(HourLlavaForConditionalGeneration.from_pretrained(folders[-1]), recipe, out_dir)
    return out_dir


def _run_stage(course: _Course, told: Recipe, folder: Path, save_before_end: SaveBeforeEnd) -> None:
    """Train into a folder of the stage's own; `told` is the recipe up to here."""
    begun = prepare_folder(told, folder)
    check_packages(course.training)
    choose_parameters(course.model, course.training)
    if begun is not None:
        copy_tensors(load_file(begun / TRAINED), course.model)
    print(parts_table(course.model, learning_rates(course.model, course.training)), file=sys.stderr)
    args = _arguments(course, folder)
    callbacks = (save_before_end, Picture())
    trainer = FilmTrainer(course.model, course.training, args, course.batches, course.objective, callbacks, told)
    go(trainer, folder, begun)
    course.finish()
    install(course.model, told, folder)


def _tower(recipe: Recipe) -> _Course:
    """A model from scratch, whose tower learns to name what it sees."""
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer()
    config = tiny_config(
        vocab_size=len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        spatial_forgetting="random",
    )
    config.text_config.eos_token_id = tokenizer.eos_token_id
    config.text_config.pad_token_id = tokenizer.pad_token_id
    model = HourLlavaForConditionalGeneration(config)
    model.tokenizer = tokenizer
    with torch.no_grad():  # words as loud as visual tokens: a faint question is drowned in MemAug's query stream
        model.model.embed_tokens.weight.div_(config.text_config.initializer_range)
    tower, steps = model.model.vision_tower, recipe.tower_steps
    add_naming(tower)
    frames = LabelledFrames(steps, config.vision_config.image_size)
    training = _training(recipe, TOWER, ("vision_tower",), _TOWER_RATE, 1.0, steps, recipe.seed)
    finish = lambda: finish_tower(tower, frames[steps - 1]["pixels"])  # noqa: E731
    return _Course(training, min(50, steps), model, frames, name_frames, finish)


def _stage(recipe: Recipe, number: int, start: Path) -> _Course:
    """What the recipe's stage ``number``, from 1 on, does with the model that ``start`` holds."""
    stage, seed = recipe.stages[number - 1], recipe.seed + number - 1
    model = HourLlavaForConditionalGeneration.from_pretrained(start)
    lessons = Lessons(stage, model.tokenizer, model.config.vision_config.image_size, seed)
    rates = stage.learning_rate, stage.tower_rate
    training = _training(recipe, stage.name, stage.trains, *rates, stage.steps, seed)
    return _Course(training, stage.warmup_steps, model, lessons, partial(answer_questions, stage=stage))


def _training(
    recipe: Recipe, name: str, trains: tuple[str, ...], rate: float, tower_rate: float, steps: int, seed: int
) -> Training:
    """A stage in the words of the paper's; a sample of its data is the batch of a step."""
    return Training(
        name=f"{recipe.name} {name}",
        model="",
        trains=trains,
        learning_rate=rate,
        tower_rate=rate * tower_rate,
        projector_rate=rate,
        resampler_rate=rate,
        batch_size=1,
        max_steps=steps,
        schedule="cosine_with_min_lr",
        bf16=False,
        gradient_checkpointing=False,
        parallel="ddp",
        save_steps=recipe.save_steps,
        report_to=recipe.report_to,
        seed=seed,
    )


def _arguments(course: _Course, folder: Path) -> TrainingArguments:
    args = training_arguments(course.training, folder, 1)
    args.warmup_steps = course.warmup_steps
    args.lr_scheduler_kwargs = {"min_lr_rate": _LAST_RATE}
    return args


def _draw_stages(folders: list[Path], path: Path) -> None:
    """One picture of all stages, one after the other."""
    history: list[dict[str, float]] = []
    for folder in folders:
        done = history[-1]["step"] if history else 0
        state = json.loads((checkpoints(folder)[-1] / "trainer_state.json").read_text())
        history += [{**entry, "step": done + entry["step"]} for entry in state["log_history"] if "loss" in entry]
    draw(history, path)
