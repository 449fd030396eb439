# SPDX-License-Identifier: Apache-2.0
"""Rendered films with questions as training data: item `n` is the batch of step `n`, the same in every run."""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hourllava.data import Film
from hourllava.data.film import EVENT_SECONDS
from hourllava.data.questions import Question
from hourllava.model.prompt import build_example
from hourllava.train.recipes import Stage

IMAGE_FILM = 64  # seconds of the film that an image is taken from: at any time of its day, in any of its scenes
NOISE = 5.0  # of 255: about what H.264 and resizing leave behind


class Batch(TypedDict):
    """One film a sample, all of the same length."""

    input_ids: Tensor  # (B, L) int64, right padded
    attention_mask: Tensor  # (B, L)
    labels: Tensor  # (B, L) int64
    pixel_values: list[Tensor]  # B of (T, 3, S, S) float32, normalised
    answer_frames: list[list[int]]  # per sample, the frames that show the answer; empty if no short event does


class Drawn(NamedTuple):
    """All that chance decides of a sample."""

    film: Film
    question: Question
    times: Sequence[int]  # T seconds of the film
    noise: np.ndarray  # (T,) which picture of noise lies on each


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
        drawn = self.draw(seconds, size)
        encoded = [build_example(self.tokenizer, [(one.question.text, one.question.answer)]) for one in drawn]
        ids, labels = (pad_sequence(list(x), batch_first=True, padding_value=-1) for x in zip(*encoded, strict=True))
        valid = ids >= 0
        shown = [one.question.second if seconds > 1 else None for one in drawn]
        return Batch(
            input_ids=ids.masked_fill(~valid, self.tokenizer.pad_token_id),
            attention_mask=valid.long(),
            labels=labels.masked_fill(~valid, -100),
            pixel_values=[self._pixels(one) for one in drawn],
            answer_frames=[[] if second is None else list(range(second, second + EVENT_SECONDS)) for second in shown],
        )

    def draw(self, seconds: int, size: int) -> list[Drawn]:
        """What `batch` would be made of, without a picture; the next batch is another one either way."""
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
        return [self._timed(film, question, seconds) for film, question in zip(films, asked, strict=True)]

    def _timed(self, film: Film, question: Question, seconds: int) -> Drawn:
        times = range(seconds) if seconds > 1 else (film.events[0].start + int(self.rng.integers(2)),)
        return Drawn(film, question, times, self.rng.integers(len(self.noise), size=len(times)))

    def _pixels(self, drawn: Drawn) -> Tensor:
        frames = drawn.film.seen(drawn.times, self.image_size, self.film_size)
        return (frames + self.noise[torch.from_numpy(drawn.noise)]) / 127.5 - 1


class Lessons:
    """A stage's batches by number, each as `Examples` makes it after all that come before."""

    def __init__(self, stage: Stage, tokenizer: PreTrainedTokenizerBase, image_size: int, seed: int) -> None:
        self.stage, self.tokenizer, self.image_size, self.seed = stage, tokenizer, image_size, seed
        self.lessons = [lesson for lesson in stage.lessons for _ in range(lesson.steps)]
        self.next: int
        self.examples: Examples
        self._start()

    def __len__(self) -> int:
        return len(self.lessons)

    def __getitem__(self, step: int) -> Batch:
        if step < self.next:
            self._start()
        passed = range(self.next, step)
        for number in tqdm(passed, f"{self.stage.name}: to step {step}", unit="step", disable=not passed):
            self.examples.draw(self.lessons[number].seconds, self.lessons[number].batch)
        self.next = step + 1
        return self.examples.batch(self.lessons[step].seconds, self.lessons[step].batch)

    def _start(self) -> None:
        stage, first = self.stage, (self.seed + 1) * 10_000_000
        self.next = 0
        self.examples = Examples(self.tokenizer, self.image_size, self.seed, first, stage.event_weight, stage.film_size)
