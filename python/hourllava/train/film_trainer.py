# SPDX-License-Identifier: Apache-2.0
"""The Trainer on rendered films: an item of the data is the batch of a step, and what is learned is the caller's."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import TrainerCallback, TrainingArguments

from hourllava.model import HourLlavaForConditionalGeneration
from hourllava.train.films import Batch
from hourllava.train.grounding import Grounding
from hourllava.train.recipes import Recipe, Stage, Training
from hourllava.train.report import RIGHT
from hourllava.train.trainer import VideoTrainer


class Outcome(NamedTuple):
    """What a batch has come to."""

    loss: Tensor
    right: float  # share of the answers, or names, that are predicted right
    tokens: int
    frames: int


class Batches(Protocol):
    """A batch for every step, by its number."""

    def __len__(self) -> int: ...
    def __getitem__(self, step: int, /) -> Any: ...


Objective = Callable[[HourLlavaForConditionalGeneration, Any], Outcome]


class FilmTrainer(VideoTrainer):
    """Trains by an objective, on one process; a checkpoint holds what learns, for the rest stays as it begins."""

    def __init__(
        self,
        model: HourLlavaForConditionalGeneration,
        recipe: Training,
        args: TrainingArguments,
        batches: Batches,
        objective: Objective,
        callbacks: Sequence[TrainerCallback] = (),
        told: Recipe | None = None,
    ) -> None:
        """`told`: the recipe that `recipe` is a part of, to be saved."""
        super().__init__(model, recipe, args, batches, itemgetter(0), callbacks)  # type: ignore[arg-type]
        self.told = told or recipe
        self.saves_part = True
        self.objective: Objective = objective
        self.right = 0.0

    def get_train_dataloader(self) -> DataLoader:
        """The batches in their order."""
        sampler = BatchSampler(SequentialSampler(self.samples), 1, drop_last=False)  # type: ignore[arg-type]
        return DataLoader(self.samples, batch_sampler=sampler, collate_fn=self.data_collator)  # type: ignore[arg-type]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss."""
        outcome = self.objective(self.network, inputs)
        self.right = outcome.right
        self.meter.add(outcome.tokens, outcome.frames)
        return outcome.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the share of answers that the last batch got right."""
        super().log({**logs, RIGHT: self.right} if "loss" in logs else logs, start_time)


def answer_questions(model: HourLlavaForConditionalGeneration, batch: Batch, stage: Stage) -> Outcome:
    """A stage's loss on a batch: that of the answers, and of where MemAug looks for them."""
    with Grounding(model, batch["answer_frames"]) as grounding:
        output = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
            pixel_values=batch["pixel_values"],
            memaug=stage.memaug,
        )
    loss = output.loss + stage.grounding * grounding.loss().to(output.loss.device)
    right = _answers_right(output.logits, batch["input_ids"])
    return Outcome(loss, right, output.logits.shape[:2].numel(), sum(map(len, batch["pixel_values"])))


def _answers_right(logits: Tensor, input_ids: Tensor) -> float:
    """Share of answers' first tokens that are predicted right; they follow the assistant's header."""
    # The answer follows the header <|im_start|>, role, newline of the last turn, which is the assistant's.
    column = (input_ids == input_ids[0, 0]).int().cumsum(1).argmax(1) + 3
    sample = torch.arange(len(column), device=column.device)
    # All videos of a batch have the same length and stand before the answers: they shift all columns alike.
    shift = logits.shape[1] - input_ids.shape[1]
    predicted = logits[sample, column - 1 + shift].argmax(-1)
    return (predicted == input_ids[sample, column]).float().mean().item()
