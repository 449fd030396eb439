# SPDX-License-Identifier: Apache-2.0
"""The network below the head: tower, projector and MemAug beside the decoder's layers."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from transformers import Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

import hourllava_ext as ext
from hourllava.errors import ModelError

from . import blank
from .configuration import HourLlavaConfig
from .inputs import Visual
from .memaug import MemAug
from .vision import VisionTower, count_passes


class RotaryEmbedding(Qwen2RotaryEmbedding):
    """The decoder's, whose frequencies a cast of the model leaves in float32: rounded to 16 bits they turn thousands of
    tokens by other angles than those of training."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, frequencies in before.items():
            cast_to = self._buffers[name]
            if frequencies is not None and cast_to is not None and cast_to.itemsize < frequencies.itemsize:
                self._buffers[name] = frequencies.to(cast_to.device)
        return self


class HourLlavaModel(Qwen2Model):
    """The decoder's stack with the tower, projector, newline and MemAug beside it, under the original's names."""

    def __init__(self, config: HourLlavaConfig) -> None:
        super().__init__(config.text_config)
        self.rotary_emb = RotaryEmbedding(config.text_config)
        width = config.text_config.hidden_size
        self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)
        self.mm_projector = nn.Sequential(nn.Linear(config.vision_width, width), nn.GELU(), nn.Linear(width, width))
        self.vision_resampler = MemAug(config.text_config, config.memaug_depth)
        self.vision_tower = None if config.vision_config is None else VisionTower(config.vision_config)
        self.post_init()

    def project(self, visuals: list[Visual], video_grid: int, passes: int = 0) -> list[tuple[Tensor, Tensor]]:
        """Features (n, N, Cv) of each, pooled if they are a video's, and the tokens (n, N, C) projected from them; the
        tower runs at least `passes` times.

        Raises:
            ModelError: there are pixels, but no tower.
        """
        features = [visual.content for visual in visuals]
        for modality, grid in (("video", video_grid), ("image", None)):
            chosen = [index for index, visual in enumerate(visuals) if visual.modality == modality]
            pixels = [index for index in chosen if features[index].dim() == 4]
            if pixels and self.vision_tower is None:
                raise ModelError("model", "it was built without a vision tower", "give vision_features instead")
            if pixels:
                encoded = cast(VisionTower, self.vision_tower).encode([features[index] for index in pixels], grid)
                for index, feature in zip(pixels, encoded, strict=True):
                    features[index] = feature
            for index in chosen:
                features[index] = features[index].to(self.image_newline)
                if grid and features[index].shape[1] > grid**2:
                    features[index] = ext.pool_grid(features[index], grid)
        rows = torch.cat([feature.flatten(0, 1) for feature in features])
        missing = passes - count_passes([v.content for v in visuals], [v.modality for v in visuals])
        if missing > 0 and self.vision_tower is not None:
            # Before the projector, where the other processes' runs are: weights in shards are gathered in one order.
            rows = rows + blank.tower_runs(self.vision_tower, missing)
        rows = self.mm_projector(rows)
        tokens = rows.split([feature.shape[0] * feature.shape[1] for feature in features])
        return [(f, t.view(*f.shape[:2], -1)) for f, t in zip(features, tokens, strict=True)]
