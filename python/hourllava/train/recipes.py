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

GROUNDING = 1.0  # strong: until MemAug finds the event, everything that it could say about it is a guess


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
    attention on the pages that show the answer, which rendered films know.
    """
    everything = tuple(PARTS)
    return Recipe(
        name="tiny",
        tower_steps=3500,
        stages=(
            Stage(
                "base",
                ("mm_projector", "language_model"),
                (Lesson(1, 400, 64),),
                learning_rate=2e-3,
                memaug=False,
            ),
            Stage("s1", ("vision_resampler",), (Lesson(1, 200, 64),), learning_rate=2e-3),
            Stage("s2", everything, (Lesson(4, 40, 64), Lesson(8, 200, 48), Lesson(16, 150, 48)), grounding=GROUNDING),
            Stage(
                "s3",
                ("mm_projector", "vision_resampler", "language_model"),
                (
                    Lesson(32, 80, 32),
                    Lesson(64, 40, 20),
                    Lesson(128, 30, 12),
                    Lesson(512, 12, 5),
                    Lesson(1800, 8, 2),
                ),
                learning_rate=7e-4,
                warmup_steps=20,
                grounding=GROUNDING,
            ),
        ),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"tiny": tiny}
