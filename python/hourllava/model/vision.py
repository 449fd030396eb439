# SPDX-License-Identifier: Apache-2.0
"""The SigLIP tower: frames to patch features, read after the last configured layer and before any norm or head."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

import hourllava_ext as ext

CHUNK = 128


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
        return tower.encoder(inputs_embeds=tower.embeddings(self._normalise(frames))).last_hidden_state

    def encode(self, frames: list[Tensor], grid: int | None) -> list[Tensor]:
        """Features (n, patches, width) of each entry's (n, 3, S, S), pooled to grid * grid where that is given.

        Entries share passes of 128 frames, so that an hour's patches never exist at once if they are pooled.
        """
        together = frames if len({f.dtype for f in frames}) == 1 else [self._normalise(f) for f in frames]
        passes = []
        for part in torch.cat([f.to(self.model.post_layernorm.weight.device) for f in together]).split(CHUNK):
            features = self(part)
            if grid is not None and features.shape[1] > grid**2:
                features = ext.pool_grid(features, grid)
            passes.append(features)
        return list(torch.cat(passes).split([len(f) for f in frames]))

    def _normalise(self, frames: Tensor) -> Tensor:
        pixels = frames.to(self.model.post_layernorm.weight)
        return pixels / 127.5 - 1 if frames.dtype == torch.uint8 else pixels


def count_passes(content: Sequence[Tensor], modalities: Sequence[str]) -> int:
    """How often the tower runs for what stands at the marks of a batch: features need it no more.

    Args:
        content: (n, 3, S, S) pixels or (n, N, Cv) features of each.
        modalities: "video" or "image" of each.
    """
    counts = dict.fromkeys(modalities, 0)
    for one, modality in zip(content, modalities, strict=True):
        counts[modality] += len(one) if one.dim() == 4 and one.shape[1] == 3 else 0
    return sum(math.ceil(count / CHUNK) for count in counts.values())
