# SPDX-License-Identifier: Apache-2.0
"""Pre-training of the tiny vision tower, which stands in for a downloaded SigLIP: name what a frame shows."""

from dataclasses import replace
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hourllava.data.drawing import LANDSCAPES, SHAPES
from hourllava.data.film import COLOURS, MOTIONS, PARTS_OF_DAY, PLACES, Film
from hourllava.model import HourLlavaForConditionalGeneration
from hourllava.model.vision import VisionTower
from hourllava.train.film_trainer import Outcome

_NAMES = [list(names) for names in (SHAPES, COLOURS, MOTIONS, PLACES, LANDSCAPES, PARTS_OF_DAY, COLOURS)]
_SIZES = [len(SHAPES) + 1, *(len(names) for names in _NAMES[1:])]
_FIRST_FILM = 2**40
_SECONDS = 100
_BATCH = 64


class Frames(TypedDict):
    """Single frames of films, and what they show."""

    pixels: Tensor  # (B, 3, S, S) float32, normalised
    names: Tensor  # (B, 7) int64, -100 where nothing has a name


class LabelledFrames:
    """Frames by the number of their step, one in five without an event."""

    def __init__(self, steps: int, image_size: int, batch: int = _BATCH) -> None:
        self.steps, self.image_size, self.batch = steps, image_size, batch

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Frames:
        rng = np.random.default_rng([step, 1])
        frames, names = [], []
        for index in range(self.batch):
            film = Film.random(_FIRST_FILM + step * self.batch + index, _SECONDS)
            event = film.events[rng.integers(len(film.events))]
            seen = (event.shape, event.colour, event.motion, event.place, event.landscape, event.part_of_day, film.ball)
            name = [known.index(one) for known, one in zip(_NAMES, seen, strict=True)]
            if index % 5 == 0:
                film = replace(film, events=())
                name[:4] = [len(SHAPES), -100, -100, -100]
            frames.append(film.frame(event.start + index % 2, self.image_size))
            names.append(name)
        pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2) / 127.5 - 1
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(step))
        return Frames(pixels=pixels + 0.04 * noise, names=torch.tensor(names))


def add_naming(tower: VisionTower) -> None:
    """Give the tower a layer that names what a patch's frame shows, drawn from torch's global generator."""
    tower.naming = nn.Linear(tower.model.config.hidden_size, sum(_SIZES))


def name_frames(model: HourLlavaForConditionalGeneration, batch: Frames) -> Outcome:
    """Every patch, wherever it stands, names what the frame shows.

    That is the event's shape (or none), colour, motion and corner, the landscape, the part of the day and the ball's
    colour. So every token of a frame knows of the whole frame, as a downloaded tower's tokens do.
    """
    tower = model.model.vision_tower
    logits = tower.naming(tower(batch["pixels"])).split(_SIZES, -1)
    frames, patches = logits[0].shape[:2]
    names = batch["names"][:, None].expand(-1, patches, -1)
    losses = [F.cross_entropy(scores.flatten(0, 1), names[..., i].flatten()) for i, scores in enumerate(logits)]
    hits = torch.stack([scores.argmax(-1) for scores in logits], -1) == names
    return Outcome(torch.stack(losses).sum(), hits[names >= 0].float().mean().item(), frames * patches, frames)


def finish_tower(tower: VisionTower, pixels: Tensor) -> None:
    """Take the naming out again, and give the output for ``pixels`` a standard deviation of one.

    What the tower says stays the same: whatever is added to the residual stream is divided alike; the norms before each
    layer undo that for the layer.
    """
    del tower.naming
    vision = tower.model
    layers = vision.encoder.named_parameters()
    added = [p for name, p in layers if name.split(".")[-2] in ("out_proj", "fc2")]
    with torch.no_grad():
        scale = tower(pixels.to(vision.device)).std()
        for parameter in (*vision.embeddings.parameters(), *added):
            parameter.div_(scale)
