# SPDX-License-Identifier: Apache-2.0
"""Where a run comes to numbers that are none, it ends, and keeps what it had."""

from pathlib import Path

import pytest
import torch
from training_data import Toy, collate, make_recipe

from hourllava.errors import RecipeError
from hourllava.train import train
from hourllava.train.resume import checkpoints
from hourllava.train.trainer import VideoTrainer
from hourllava.train.training import load_model


def test_a_loss_that_is_no_number_ends_the_run(base: Path, tmp_path: Path) -> None:
    recipe = make_recipe(base, save_steps=1, learning_rate=1e30)
    said = r"step \d: its (loss|grad_norm) is (nan|inf).*; look at what this step was given"
    with pytest.raises(RecipeError, match=said) as caught:
        train(recipe, tmp_path, Toy(12), collate)
    (last,) = checkpoints(tmp_path)
    assert f"{last.name} is as it was" in str(caught.value)
    assert all(bool(weight.isfinite().all()) for weight in load_model(recipe, last).parameters())
    assert not (tmp_path / "model.safetensors").exists()


def test_gradients_that_are_no_numbers_end_the_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of their step is one still, and the weights would be saved before the next."""
    clip = VideoTrainer._clip_grad_norm

    def spoil(self: VideoTrainer, model: torch.nn.Module) -> torch.Tensor:
        return clip(self, model) * (float("inf") if self.state.global_step == 2 else 1)

    monkeypatch.setattr(VideoTrainer, "_clip_grad_norm", spoil)
    with pytest.raises(RecipeError, match="step 3: its grad_norm is inf; checkpoint-2 is as it was"):
        train(make_recipe(base, save_steps=1), tmp_path, Toy(12), collate)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
