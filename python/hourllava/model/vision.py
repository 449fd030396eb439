# SPDX-License-Identifier: Apache-2.0
"""The SigLIP tower: frames to patch features, read after the last configured layer and before any norm or head."""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel


class VisionTower(nn.Module):
    """transformers' SigLIP under the original's names; its `post_layernorm` is kept in checkpoints but never run."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.vision_tower = nn.ModuleDict({"vision_model": SiglipVisionModel(config)})

    @property
    def model(self) -> SiglipVisionModel:
        return cast(SiglipVisionModel, self.vision_tower["vision_model"])

    def forward(self, frames: Tensor) -> Tensor:
        """Frames (T, 3, S, S), uint8 RGB or already normalised floats, to features (T, patches, width)."""
        tower = self.model
        pixels = frames.to(tower.post_layernorm.weight.dtype)
        if frames.dtype == torch.uint8:
            pixels = pixels / 127.5 - 1
        return tower.encoder(inputs_embeds=tower.embeddings(pixels)).last_hidden_state
