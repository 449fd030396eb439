# SPDX-License-Identifier: Apache-2.0
"""Recipes are functions: each returns everything that a training run depends on."""

from collections.abc import Callable
from dataclasses import dataclass

PARTS = {
    "vision_tower": "model.vision_tower.",
    "mm_projector": "model.mm_projector.",
    "vision_resampler": "model.vision_resampler.",
    "language_model": "",  # whatever no other part holds: decoder, embeddings and the newline token
}
TOWER_RATE = 0.05  # the tower's learning rate beside the resampler's, 5e-6 to 1e-4 in the original's stage 2


@dataclass(frozen=True)
class Lesson:
    """``steps`` optimizer steps on batches of ``batch`` films of ``seconds`` seconds (1: an image)."""

    seconds: int
    steps: int
    batch: int


@dataclass(frozen=True)
class Stage:
    """Lessons in order under one learning-rate schedule: linear warm-up, then cosine to a twentieth."""

    name: str
    trains: tuple[str, ...]  # names of PARTS
    lessons: tuple[Lesson, ...]
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    memaug: bool = True  # False: the kept tokens go straight to the decoder
    grounding: float = 0.0  # weight of the reward for attention on the pages that show the answer
    event_weight: int = 1  # how much likelier than another topic it is to be asked what happened in a landscape

    @property
    def steps(self) -> int:
        return sum(lesson.steps for lesson in self.lessons)


@dataclass(frozen=True)
class Recipe:
    """A model's whole training; ``tower_steps`` of tower pre-training come before the first stage."""

    name: str
    stages: tuple[Stage, ...]
    tower_steps: int
    seed: int = 0


def tiny() -> Recipe:
    """The paper's three stages in miniature, on rendered films, for two CPU cores.

    The original starts from a pre-trained SigLIP and an image model; a start of the same kind is made here first: the
    tower learns to name what each patch shows, and `base` teaches projector and decoder to talk about single images.
    Stages 1 to 3 then train the parts that the original trains (SPEC C.1). Beyond the original, stages 2 and 3 reward
    attention on the pages that show the answer, which rendered films know: strongly until MemAug finds the events, as
    all it could say of them before is a guess, then weakly.
    """
    images = (Lesson(1, 1000, 64),)
    clips = (Lesson(4, 40, 64), Lesson(8, 200, 48), Lesson(16, 300, 48))
    return Recipe(
        name="tiny",
        tower_steps=3500,
        stages=(
            Stage("base", ("mm_projector", "language_model"), images, learning_rate=2e-3, memaug=False),
            Stage("s1", ("vision_resampler",), (Lesson(1, 200, 64),), learning_rate=2e-3),
            Stage("s2", tuple(PARTS), clips, grounding=1.0),
            *_long_videos(),
        ),
    )


def _long_videos() -> tuple[Stage, ...]:
    """Stage 3 in three rounds: what happened in a landscape, among hundreds of seconds of it, is learned last."""
    parts = ("mm_projector", "vision_resampler", "language_model")
    first = (Lesson(32, 200, 32), Lesson(64, 80, 20), Lesson(128, 60, 12), Lesson(512, 40, 5), Lesson(1800, 25, 2))
    second = (Lesson(16, 80, 48), Lesson(32, 160, 32), Lesson(128, 80, 12), Lesson(512, 40, 5), Lesson(1800, 10, 2))
    third = (Lesson(32, 60, 32), Lesson(128, 100, 12), Lesson(512, 70, 5), Lesson(1800, 15, 2))
    return (
        Stage("s3", parts, first, 7e-4, warmup_steps=20, grounding=0.1),
        Stage("s3-second", parts, second, 7e-4, 20, grounding=0.3, event_weight=4),
        Stage("s3-third", parts, third, 7e-4, 20, grounding=0.3, event_weight=4),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"tiny": tiny}
