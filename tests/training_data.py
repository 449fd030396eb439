# SPDX-License-Identifier: Apache-2.0
"""Conversations for training tests, without files: text, images, videos of frames or features, in a fixed order."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_model import make_tokenizer

from hourllava.data.collator import Collator
from hourllava.model.prompt import build_example
from hourllava.train import Training

KINDS = ("video", "text", "image", "features")


LONG = 130  # frames of some videos: two passes of the tower


class Toy:
    """Sample `n` is of the kind `KINDS[n % 4]`; what it shows follows from its number. Some videos are `long`."""

    def __init__(self, count: int, long: bool = False) -> None:
        self.count, self.long = count, long
        self.tokenizer = make_tokenizer()

    @property
    def lengths(self) -> list[int]:
        return [n % 7 for n in range(self.count)]

    @property
    def modalities(self) -> list[str]:
        return [KINDS[n % len(KINDS)] for n in range(self.count)]

    @property
    def streams(self) -> list[str]:
        return [""] * self.count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(number)
        kind = self.modalities[number]
        frames = LONG if self.long and number % 8 == 0 else 1 + number % 5
        ids, labels = build_example(self.tokenizer, [(f"What is {number}?", f"It is {number}.")])
        content: list[torch.Tensor] = []
        if kind == "text":
            keep = ids != self.tokenizer.convert_tokens_to_ids("<image>")
            ids, labels = ids[keep], labels[keep]
        elif kind == "features":
            content = [torch.randn(frames, 64, 64, generator=generator)]
        else:
            shape = (1 if kind == "image" else frames, 3, 64, 64)
            content = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)]
        return {
            "input_ids": ids,
            "labels": labels,
            "pixel_values": content,
            "modalities": ["image" if kind == "image" else "video"] * len(content),
            "image_sizes": [None] * len(content),
        }


def collate(items: Sequence[Any]) -> dict[str, Any]:
    return Collator(make_tokenizer())(items)


def make_recipe(model: Path, **changes: Any) -> Training:
    """A recipe for `Toy`: five steps of two samples, all parts, a rate for each."""
    recipe = Training(
        name="toy",
        model=str(model),
        trains=("vision_tower", "mm_projector", "vision_resampler", "language_model"),
        learning_rate=4e-3,
        tower_rate=1e-3,
        projector_rate=2e-3,
        resampler_rate=3e-3,
        batch_size=2,
        batch_per_device=1,
        max_steps=5,
        bf16=False,
        gradient_checkpointing=False,
        min_frames=1,
        time_instruction=False,
        parallel="ddp",
        workers=0,
        report_to="none",
    )
    return replace(recipe, **changes)
