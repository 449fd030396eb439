# SPDX-License-Identifier: Apache-2.0
"""From the projected tokens of a video's frames to the rows of its memory, and to the few that stay queries."""

import torch
from torch import Tensor, nn

from hourllava.model.configuration import HourLlavaConfig
from hourllava.model.forgetting import Forgetting as Rules
from hourllava.model.remembering import Choice, keep_of_video


class FrameMemory(nn.Module):
    """Every token of every frame, and a newline behind each frame, under the original's name `image_newline`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Projected tokens (T, N, C) to the memory (T * (N + 1), C) and its position ids, which count from 0."""
        newline = self.image_newline.to(frames.dtype).expand(len(frames), 1, -1)
        rows = torch.cat([frames, newline], dim=1).flatten(0, 1)
        return rows, torch.arange(len(rows), device=rows.device)


class Forgetting(nn.Module):
    """The paper's forgetting: some tokens of some frames stay queries. It has no parameters.

    Args:
        temporal_ratio, max_frames: of T frames, max(1, min(max_frames, T // temporal_ratio)) are kept.
        spatial_ratio: share of a kept frame's tokens that stays.
        temporal: "uniform", "random", "keyframe" or "question".
        spatial: "uniform" (a regular grid) or "random".
        seed: of the random rules; the same seed keeps the same tokens.
    """

    def __init__(
        self,
        temporal_ratio: int = 4,
        max_frames: int = 512,
        spatial_ratio: float = 0.25,
        temporal: str = "uniform",
        spatial: str = "uniform",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = HourLlavaConfig(
            temporal_ratio=temporal_ratio,
            max_kept_frames=max_frames,
            spatial_ratio=spatial_ratio,
            temporal_forgetting=temporal,
            spatial_forgetting=spatial,
            forgetting_seed=seed,
        )

    def forward(
        self, frames: Tensor, newline: Tensor, features: Tensor | None = None, question: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keep the queries of one video.

        Args:
            frames: (T, N, C) projected tokens, N a square number.
            newline: (C,), put behind each kept frame.
            features: (T, N, Cv) of the tower, for the rule "keyframe".
            question: (words, C) embeddings, for the rule "question".

        Returns:
            (n * (k + 1), C) and their position ids in the memory that `FrameMemory` makes.

        Raises:
            InputError: the rule lacks the features or the question that it goes by.
        """
        words = frames.new_zeros(0, frames.shape[2]) if question is None else question
        choice = Choice(Rules.of(self.config), words, features)
        kept = keep_of_video(self.config, frames, newline.to(frames.dtype), choice)
        return kept.tokens, kept.position_ids
