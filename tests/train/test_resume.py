# SPDX-License-Identifier: Apache-2.0
"""What a run goes on from: random states among the rest, the recipe beside every checkpoint, the paper's settings."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import make_model
from training_data import Toy, collate, make_recipe

from hourllava.errors import RecipeError
from hourllava.train import RECIPES, Training, train
from hourllava.train.overrides import load_recipe
from hourllava.train.resume import checkpoints
from hourllava.train.runs import StoppedError, is_done
from hourllava.train.training import training_arguments


class Ended(Toy):
    """Asks the run to end when so many samples are taken."""

    def __init__(self, count: int, ends: Sequence[int]) -> None:
        super().__init__(count)
        self.ends, self.taken = ends, 0

    def __getitem__(self, number: int) -> dict[str, Any]:
        self.taken += 1
        if self.taken in self.ends:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(number)


def losses(folder: Path) -> list[float]:
    state = json.loads((checkpoints(folder)[-1] / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose decoder drops a third of its attention while it trains, as torch's generator has it."""
    model = make_model(min_frames=1)
    model.config.text_config.attention_dropout = 0.3
    folder = tmp_path_factory.mktemp("dropping")
    model.save_pretrained(folder)
    return folder


def test_random_states_go_on(base: Path, dropping: Path, tmp_path: Path) -> None:
    """Stopped after every step, a run drops what a run that nobody stops does."""
    recipe = make_recipe(dropping, max_steps=4, save_steps=100, gradient_checkpointing=True)
    train(recipe, tmp_path / "whole", Toy(12), collate)
    train(make_recipe(base, max_steps=4), tmp_path / "plain", Toy(12), collate)
    assert losses(tmp_path / "whole")[0] != losses(tmp_path / "plain")[0]
    for step in (1, 2, 3):
        with pytest.raises(StoppedError, match=f"checkpoint-{step} is saved"):
            train(recipe, tmp_path / "parts", Ended(12, [1]), collate)
        torch.rand(step)  # whatever else has drawn from it
    train(recipe, tmp_path / "parts", Toy(12), collate)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_stop_at_the_last_step_is_the_end(base: Path, tmp_path: Path) -> None:
    recipe = make_recipe(base, max_steps=2)
    train(recipe, tmp_path, Ended(12, [4]), collate)
    assert load_recipe(tmp_path / "recipe.json") == recipe


def test_the_recipe_lies_beside_every_checkpoint(base: Path, tmp_path: Path) -> None:
    recipe = make_recipe(base, max_steps=3, save_steps=1, keep=3)
    train(recipe, tmp_path, Toy(6), collate)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert [load_recipe(path / "recipe.json") for path in (*checkpoints(tmp_path), tmp_path)] == [recipe] * 4


def test_a_folder_of_another_recipe(base: Path, tmp_path: Path) -> None:
    train(make_recipe(base, max_steps=1), tmp_path, Toy(4), collate)
    with pytest.raises(RecipeError, match=r"--max-steps was 1 and is 2; give the same values, or another -o"):
        train(make_recipe(base, max_steps=2), tmp_path, Toy(4), collate)
    other = RECIPES["tiny"]()
    with pytest.raises(RecipeError, match=r"the name was toy and is tiny, .* and \d+ more"):
        is_done(other, tmp_path)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "tiny"])
def test_the_trainer_is_told_the_papers_values(name: str, tmp_path: Path) -> None:
    """The paper's values, as they arrive where they act."""
    recipe = RECIPES[name]()
    assert isinstance(recipe, Training)
    args = training_arguments(recipe, tmp_path, recipe.accumulation(64))
    told = (args.per_device_train_batch_size * args.gradient_accumulation_steps * 64, args.num_train_epochs)
    assert told == (256 if name == "s3-7b" else 128, 1)
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (recipe.learning_rate, 0, 1)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (args.lr_scheduler_type, args.get_warmup_steps(1000), args.max_steps) == ("cosine", 30, -1)
    assert (args.bf16, args.logging_steps, args.save_steps) == (True, 1, recipe.save_steps)
    assert args.tf32 is not True
