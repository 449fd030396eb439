# SPDX-License-Identifier: Apache-2.0
"""Pre-training of the tiny vision tower, which stands in for a downloaded SigLIP: name what a frame shows."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from hourllava.data.drawing import LANDSCAPES, SHAPES
from hourllava.data.film import COLOURS, MOTIONS, PARTS_OF_DAY, PLACES, Film
from hourllava.model.vision import VisionTower

_NAMES = [list(names) for names in (SHAPES, COLOURS, MOTIONS, PLACES, LANDSCAPES, PARTS_OF_DAY, COLOURS)]
_FIRST_FILM = 2**40
_SECONDS = 100


def pretrain_tower(tower: VisionTower, steps: int, image_size: int, learning_rate: float = 2e-3) -> float:
    """Train on single frames; returns the share of names that the last batch's patches gave right.

    Every patch, wherever it stands, names what the frame shows: the event's shape (or none), colour, motion and corner,
    the landscape, the part of the day and the ball's colour. So every token of a frame knows of the whole frame, as a
    downloaded tower's tokens do.
    """
    sizes = [len(SHAPES) + 1, *(len(names) for names in _NAMES[1:])]
    head = nn.Linear(tower.model.config.hidden_size, sum(sizes))
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, min(50, steps), steps, min_lr_rate=0.05)
    progress = tqdm(range(steps), "tower", unit="step")
    right = 0.0
    for step in progress:
        pixels, labels = _labelled_frames(step, 64, image_size)
        logits = head(tower(pixels)).split(sizes, -1)
        target = labels[:, None].expand(-1, logits[0].shape[1], -1)
        losses = [F.cross_entropy(scores.flatten(0, 1), target[..., i].flatten()) for i, scores in enumerate(logits)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        hits = torch.stack([scores.argmax(-1) for scores in logits], -1) == target
        right = hits[target >= 0].float().mean().item()
        progress.set_postfix(right=f"{right:.3f}")
    _rescale(tower, pixels)
    return right


@torch.no_grad()
def _rescale(tower: VisionTower, pixels: Tensor) -> None:
    """Give the tower's output a standard deviation of one without changing what it says.

    Whatever is added to the residual stream is divided alike; the norms before each layer undo that for the layer.
    """
    vision = tower.model
    layers = vision.encoder.named_parameters()
    added = [p for name, p in layers if name.split(".")[-2] in ("out_proj", "fc2")]
    scale = tower(pixels).std()
    for parameter in (*vision.embeddings.parameters(), *added):
        parameter.div_(scale)


def _labelled_frames(step: int, count: int, image_size: int) -> tuple[Tensor, Tensor]:
    """Frames (count, 3, S, S), one in five without an event, and labels (count, 7), -100 where nothing has a name."""
    rng = np.random.default_rng([step, 1])
    frames, labels = [], []
    for index in range(count):
        film = Film.random(_FIRST_FILM + step * count + index, _SECONDS)
        event = film.events[rng.integers(len(film.events))]
        named = [event.shape, event.colour, event.motion, event.place, event.landscape, event.part_of_day, film.ball]
        label = [names.index(name) for names, name in zip(_NAMES, named, strict=True)]
        if index % 5 == 0:
            film = replace(film, events=())
            label[:4] = [len(SHAPES), -100, -100, -100]
        frames.append(film.frame(event.start + index % 2, image_size))
        labels.append(label)
    pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2) / 127.5 - 1
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(step))
    return pixels + 0.04 * noise, torch.tensor(labels)
