# SPDX-License-Identifier: Apache-2.0
"""Tower pre-training: labels tell what frames show, and the output comes out at a standard deviation of one."""

import torch

from hourllava.data.drawing import SHAPES
from hourllava.model import HourLlavaForConditionalGeneration, tiny_config
from hourllava.train import tower as tower_module
from hourllava.train.tower import pretrain_tower


def test_one_frame_in_five_has_no_event() -> None:
    pixels, labels = tower_module._labelled_frames(0, 20, 64)
    assert pixels.shape == (20, 3, 64, 64)
    assert (labels[:, 0] == len(SHAPES)).sum() == 4
    assert (labels[:, 1] == -100).sum() == 4
    assert (labels[:, 4:] >= 0).all()


def test_rescaling_changes_the_scale_and_nothing_else() -> None:
    torch.manual_seed(0)
    tower = HourLlavaForConditionalGeneration(tiny_config()).model.vision_tower
    pixels, _ = tower_module._labelled_frames(0, 16, 64)
    before = tower(pixels)
    tower_module._rescale(tower, pixels)
    after = tower(pixels)
    assert abs(after.std().item() - 1) < 1e-3
    torch.testing.assert_close(after * before.std(), before, rtol=1e-3, atol=1e-3)


def test_a_few_steps_already_learn() -> None:
    torch.manual_seed(0)
    tower = HourLlavaForConditionalGeneration(tiny_config()).model.vision_tower
    right = pretrain_tower(tower, 60, 64)
    assert right > 0.35  # seven names with 3 to 9 choices: guessing gives about 0.2
