# SPDX-License-Identifier: Apache-2.0
"""Batches of rendered films with questions, ready for the model's `forward`."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hourllava.data import Film
from hourllava.data.film import EVENT_SECONDS
from hourllava.model.prompt import build_example

IMAGE_FILM = 64  # seconds of the film that an image is taken from: at any time of its day, in any of its scenes
NOISE = 5.0  # of 255: about what H.264 and resizing leave behind


@dataclass(frozen=True)
class Batch:
    """One film a sample, all of the same length."""

    input_ids: Tensor  # (B, L) int64, right padded
    attention_mask: Tensor  # (B, L)
    labels: Tensor  # (B, L) int64
    pixels: list[Tensor]  # B of (T, 3, S, S) float32, normalised
    answer_frames: list[list[int]]  # per sample, the frames that show the answer; empty if no short event does


class Examples:
    """An endless, repeatable source of batches: films are numbered from ``first_film`` on and never come twice."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int,
        seed: int,
        first_film: int = 0,
        event_weight: int = 1,
        film_size: int | None = None,
    ) -> None:
        """Films of ``film_size`` pixels, by default ``image_size``, are resized as a file's are.

        ``event_weight``: how much likelier than another topic it is to be asked what happened in a landscape.
        """
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.film_size = film_size or image_size
        self.film = first_film
        self.event_weight = event_weight
        self.rng = np.random.default_rng([seed, first_film])
        self.noise = NOISE * torch.randn(64, 3, image_size, image_size, generator=torch.Generator().manual_seed(seed))

    def batch(self, seconds: int, size: int) -> Batch:
        """``size`` films of ``seconds`` seconds with a question each; an image shows an event."""
        films, asked = [], []
        for _ in range(size):
            self.film += 1
            # The more events, the more it matters to find the one that is asked about.
            events = int(self.rng.integers(max(1, min(8, 3 * seconds // 8)))) + 1
            films.append(Film.random(self.film, seconds if seconds > 1 else IMAGE_FILM, events))
            questions = [q for q in films[-1].questions(self.rng) if q.needle or seconds > 1]
            # A topic's chance does not depend on how many questions of it a film answers; what lasts is a topic too.
            topics = [q.topic if q.needle else "lasting" for q in questions]
            lots = sorted(set(topics)) + ["event"] * (self.event_weight - 1) * ("event" in topics)
            topic = self.rng.choice(lots)
            chosen = self.rng.choice([i for i, t in enumerate(topics) if t == topic])
            asked.append(questions[chosen])
        encoded = [build_example(self.tokenizer, [(q.text, q.answer)]) for q in asked]
        ids, labels = (pad_sequence(list(x), batch_first=True, padding_value=-1) for x in zip(*encoded, strict=True))
        valid = ids >= 0
        return Batch(
            input_ids=ids.masked_fill(~valid, self.tokenizer.pad_token_id),
            attention_mask=valid.long(),
            labels=labels.masked_fill(~valid, -100),
            pixels=[self._pixels(film, seconds) for film in films],
            answer_frames=[
                [] if q.second is None or seconds == 1 else list(range(q.second, q.second + EVENT_SECONDS))
                for q in asked
            ],
        )

    def _pixels(self, film: Film, seconds: int) -> Tensor:
        times = range(seconds) if seconds > 1 else (film.events[0].start + int(self.rng.integers(2)),)
        frames = film.seen(times, self.image_size, self.film_size)
        noise = self.noise[torch.from_numpy(self.rng.integers(len(self.noise), size=len(frames)))]
        return (frames + noise) / 127.5 - 1
