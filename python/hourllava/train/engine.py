# SPDX-License-Identifier: Apache-2.0
"""Run a recipe: build the model, go through its stages, save after each, and leave a directory that `ask` can open."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, get_cosine_with_min_lr_schedule_with_warmup

from hourllava.data.tokenizer import build_tokenizer
from hourllava.errors import RecipeError
from hourllava.model import HourLlavaForConditionalGeneration
from hourllava.model.configuration import tiny_config
from hourllava.train.examples import Batch, Examples
from hourllava.train.grounding import Grounding
from hourllava.train.overrides import RECIPE_FILE, find_recipe, show
from hourllava.train.recipes import PARTS, Recipe, Stage, Training
from hourllava.train.tower import pretrain_tower
from hourllava.train.training import train


def run(recipe_name: str, out_dir: str | Path) -> Path:
    """Train ``recipe_name`` into ``out_dir``; stages that are already there are not repeated.

    Raises:
        RecipeError: there is no such recipe, or ``out_dir`` cannot be written.
    """
    return run_recipe(find_recipe(recipe_name), Path(out_dir))


def run_recipe(recipe: Recipe | Training, out_dir: Path) -> Path:
    """Train by a recipe into ``out_dir``; see `run`, and `training.train` for one of the paper's stages."""
    if isinstance(recipe, Training):
        return train(recipe, out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / RECIPE_FILE).write_text(show(recipe))
    except OSError as error:
        raise RecipeError(f"output {out_dir}", f"it cannot be written ({error.strerror})", "give another -o") from error
    tokenizer = build_tokenizer()
    model: HourLlavaForConditionalGeneration | None = None
    for number, stage in enumerate(recipe.stages):
        done = out_dir / stage.name
        if (done / "model.safetensors").exists():
            model = HourLlavaForConditionalGeneration.from_pretrained(done)
            continue
        model = _new_model(recipe, tokenizer) if model is None else model
        train_stage(model, tokenizer, stage, seed=recipe.seed + number)
        model.save_pretrained(done)
    assert model is not None  # every recipe has a stage
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return out_dir


def _new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> HourLlavaForConditionalGeneration:
    """A model from scratch whose tower has been pre-trained."""
    torch.manual_seed(recipe.seed)
    config = tiny_config(
        vocab_size=len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        spatial_forgetting="random",
    )
    config.text_config.eos_token_id = tokenizer.eos_token_id
    config.text_config.pad_token_id = tokenizer.pad_token_id
    model = HourLlavaForConditionalGeneration(config)
    with torch.no_grad():  # words as loud as visual tokens: a faint question is drowned in MemAug's query stream
        model.model.embed_tokens.weight.div_(config.text_config.initializer_range)
    pretrain_tower(model.model.vision_tower, recipe.tower_steps, config.vision_config.image_size)
    return model


def train_stage(
    model: HourLlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, stage: Stage, seed: int
) -> list[float]:
    """Train the stage's parts through its lessons; returns the loss of every step."""
    torch.manual_seed(seed)
    groups = select_parts(model, stage.trains)
    rates = {part: stage.learning_rate * (stage.tower_rate if part == "vision_tower" else 1.0) for part in groups}
    optimizer = torch.optim.AdamW([{"params": p, "lr": rates[part]} for part, p in groups.items()], weight_decay=0.0)
    parameters = [parameter for group in groups.values() for parameter in group]
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, stage.warmup_steps, stage.steps, min_lr_rate=0.05)
    size, first = model.config.vision_config.image_size, (seed + 1) * 10_000_000
    examples = Examples(tokenizer, size, seed, first, stage.event_weight, stage.film_size)
    losses = []
    model.train()
    for lesson in stage.lessons:
        progress = tqdm(range(lesson.steps), f"{stage.name}: {lesson.seconds} s", unit="step")
        hits: list[float] = []
        for _ in progress:
            batch = examples.batch(lesson.seconds, lesson.batch)
            loss, right = train_step(model, batch, stage)
            _update(parameters, optimizer, schedule, loss)
            losses.append(loss.item())
            hits.append(right)
            progress.set_postfix(loss=f"{losses[-1]:.3f}", right=f"{sum(hits[-20:]) / len(hits[-20:]):.2f}")
    model.eval()
    return losses


def train_step(model: HourLlavaForConditionalGeneration, batch: Batch, stage: Stage) -> tuple[Tensor, float]:
    """Loss of a batch, and the share of its answers whose first token is predicted right."""
    with Grounding(model, batch.answer_frames) as grounding:
        output = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            pixel_values=batch.pixels,
            memaug=stage.memaug,
        )
    return output.loss + stage.grounding * grounding.loss(), _answers_right(output.logits, batch)


def select_parts(model: nn.Module, names: tuple[str, ...]) -> dict[str, list[nn.Parameter]]:
    """Make exactly the named parts trainable and return the parameters of each."""
    chosen: dict[str, list[nn.Parameter]] = {name: [] for name in names}
    for name, parameter in model.named_parameters():
        part = next(part for part, prefix in PARTS.items() if name.startswith(prefix))
        parameter.requires_grad_(part in names)
        if part in names:
            chosen[part].append(parameter)
    return chosen


def _update(
    parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, schedule: LRScheduler | LambdaLR, loss: Tensor
) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


def _answers_right(logits: Tensor, batch: Batch) -> float:
    """Share of answers' first tokens that are predicted right; they follow the assistant's header."""
    # The answer follows the header <|im_start|>, role, newline of the last turn, which is the assistant's.
    column = (batch.input_ids == batch.input_ids[0, 0]).int().cumsum(1).argmax(1) + 3
    sample = torch.arange(len(column))
    # All videos of a batch have the same length and stand before the answers: they shift all columns alike.
    shift = logits.shape[1] - batch.input_ids.shape[1]
    predicted = logits[sample, column - 1 + shift].argmax(-1)
    return (predicted == batch.input_ids[sample, column]).float().mean().item()
