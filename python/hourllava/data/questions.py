# SPDX-License-Identifier: Apache-2.0
"""Questions of VideoMarathon's six topics about a rendered film, with their answers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from hourllava.data.film import Event, Film

TOPICS = ("temporality", "spatiality", "object", "action", "scene", "event")

# Several wordings of each question; the first is the one that evaluation and the demo use.
_WORDINGS = {
    "temporality": ("When did the {shape} appear?", "At what time of day did the {shape} appear?"),
    "spatiality": ("Where was the {shape}?", "In which corner was the {shape}?"),
    "object": ("Which colour was the {shape}?", "What colour did the {shape} have?"),
    "action": ("Which way did the {shape} move?", "In which direction did the {shape} go?"),
    "scene": ("In which scene did the {shape} appear?", "Which scene was the {shape} in?"),
    "event": ("Which shape appeared in the {landscape}?", "What shape was seen in the {landscape}?"),
    "first scene": ("Which scene came first?", "In which scene did the video begin?"),
    "last scene": ("Which scene came last?", "In which scene did the video end?"),
}
# The tokenizer knows words for the ball, which rolls through every film to distract and is not asked about.
_ABOUT_THE_BALL = ("Which colour was the ball?", "What colour did the ball have?")


@dataclass(frozen=True)
class Question:
    """A question with its answer; ``needle``: only a two-second event tells it, which began at ``second``."""

    topic: str
    text: str
    answer: str
    needle: bool
    second: int | None = None


def ask_about(film: "Film", rng: np.random.Generator | None = None) -> list[Question]:
    """Every question that ``film`` answers without ambiguity, in the order of its events."""

    def word(kind: str, **names: str) -> str:
        wordings = _WORDINGS[kind]
        return wordings[0 if rng is None else rng.integers(len(wordings))].format(**names)

    questions = []
    for event in film.events:
        answers = {
            "spatiality": event.place,
            "object": event.colour,
            "action": event.motion,
        }
        if film.one_part_of_day(event):
            answers["temporality"] = event.part_of_day
        if film.one_scene(event):
            answers["scene"] = event.landscape
        questions += [Question(t, word(t, shape=event.shape), a, True, event.start) for t, a in answers.items()]
    questions += [
        Question("event", word("event", landscape=event.landscape), event.shape, True, event.start)
        for event in _alone_in_their_scene(film)
    ]
    if len(film.scenes) > 1:
        questions.append(Question("scene", word("first scene"), film.scenes[0].landscape, False))
        questions.append(Question("scene", word("last scene"), film.scenes[-1].landscape, False))
    return questions


def _alone_in_their_scene(film: "Film") -> list["Event"]:
    places = [event.landscape for event in film.events]
    return [event for event in film.events if places.count(event.landscape) == 1 and film.one_scene(event)]


def chance(topic: str) -> float:
    """The share of right answers of a guesser who knows the topic's possible answers and nothing else."""
    return 1 / len(possible_answers()[topic])


def possible_answers() -> dict[str, tuple[str, ...]]:
    """The answers that a question of each topic can have."""
    from hourllava.data import drawing, film

    return {
        "temporality": film.PARTS_OF_DAY,
        "spatiality": tuple(film.PLACES),
        "object": tuple(film.COLOURS),
        "action": tuple(film.MOTIONS),
        "scene": tuple(drawing.LANDSCAPES),
        "event": tuple(drawing.SHAPES),
    }


def vocabulary() -> list[str]:
    """Every sentence pattern filled with every name: the text that the tiny tokenizer is trained on."""
    answers = possible_answers()
    lines = [answer for topic in TOPICS for answer in answers[topic]]
    for wordings in (*_WORDINGS.values(), _ABOUT_THE_BALL):
        for wording in wordings:
            lines += [wording.format(shape=s, landscape=g) for s in answers["event"] for g in answers["scene"]]
    return lines
