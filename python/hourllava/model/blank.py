# SPDX-License-Identifier: Apache-2.0
"""What is run when there is nothing to see, so that processes that train together all run the same modules.

Processes that share gradients or weights meet in each module. One whose batch has no picture, or fewer than another's,
runs the tower, the projector and MemAug on a blank picture all the same, and takes nothing of what comes out.
"""

import torch
from torch import Tensor

from .configuration import HourLlavaConfig
from .inputs import Visual
from .vision import VisionTower


def visual(config: HourLlavaConfig, like: Tensor) -> Visual:
    """A blank image of one tile, or features of one where the model has no tower, on the device of `like`."""
    if config.vision_config is None:
        shape: tuple[int, ...] = (1, config.patches_per_side**2, config.vision_width)
    else:
        shape = (1, 3, config.tile_size, config.tile_size)
    return Visual(torch.zeros(shape, dtype=like.dtype, device=like.device), "image", None)


def tower_runs(tower: VisionTower, passes: int) -> Tensor:
    """Zero, as the outcome of that many runs of the tower."""
    weight = tower.model.post_layernorm.weight
    size: int = tower.model.config.image_size  # type: ignore[assignment]
    frame = torch.zeros(1, 3, size, size, dtype=weight.dtype, device=weight.device)
    return 0 * torch.stack([tower(frame).sum() for _ in range(passes)]).sum()
