# SPDX-License-Identifier: Apache-2.0
"""Tower pre-training: labels tell what frames show, and the output comes out at a standard deviation of one."""

import json
from pathlib import Path

import torch

from hourllava.data.drawing import SHAPES
from hourllava.model import HourLlavaForConditionalGeneration, tiny_config
from hourllava.train import Recipe
from hourllava.train.engine import TOWER, run_recipe
from hourllava.train.report import RIGHT
from hourllava.train.resume import checkpoints
from hourllava.train.tower import LabelledFrames, add_naming, finish_tower


def test_one_frame_in_five_has_no_event() -> None:
    frames = LabelledFrames(1, 64, batch=20)[0]
    assert frames["pixels"].shape == (20, 3, 64, 64)
    names = frames["names"]
    assert (names[:, 0] == len(SHAPES)).sum() == 4
    assert (names[:, 1] == -100).sum() == 4
    assert (names[:, 4:] >= 0).all()


def test_rescaling_changes_the_scale_and_nothing_else() -> None:
    torch.manual_seed(0)
    tower = HourLlavaForConditionalGeneration(tiny_config()).model.vision_tower
    names = tower.state_dict().keys()
    add_naming(tower)
    pixels = LabelledFrames(1, 64, batch=16)[0]["pixels"]
    before = tower(pixels)
    finish_tower(tower, pixels)
    after = tower(pixels)
    assert tower.state_dict().keys() == names
    assert abs(after.std().item() - 1) < 1e-3
    torch.testing.assert_close(after * before.std(), before, rtol=1e-3, atol=1e-3)


def test_a_few_steps_already_learn(tmp_path: Path) -> None:
    run_recipe(Recipe("names", (), tower_steps=60, report_to="none"), tmp_path)
    state = json.loads((checkpoints(tmp_path / TOWER)[-1] / "trainer_state.json").read_text())
    right = [entry[RIGHT] for entry in state["log_history"] if RIGHT in entry]
    assert len(right) == 60
    assert right[-1] > 0.35  # seven names with 3 to 9 choices: guessing gives about 0.2
