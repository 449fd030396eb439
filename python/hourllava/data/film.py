# SPDX-License-Identifier: Apache-2.0
"""A rendered film: one day that passes over a few landscapes, a ball that rolls all day, and events of two seconds.

Everything is drawn from a seed, at any frame size and at any second, so the same film can be trained on frame by frame
and written to an MP4 file. The sun crosses the sky from left to right in the course of the film.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hourllava.data import drawing
from hourllava.data.questions import Question, ask_about
from hourllava.video.resize import resize_frames

EVENT_SECONDS = 2
FILM_SIZE = 128  # side in pixels of a film that is written to a file
COLOURS = {
    "red": (215, 25, 25),
    "blue": (25, 40, 230),
    "yellow": (250, 230, 20),
    "purple": (140, 30, 170),
    "black": (15, 15, 15),
    "orange": (250, 130, 0),
}
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
PARTS_OF_DAY = ("morning", "noon", "evening")
_MARGIN = 0.04  # of the film's length: no event is so near to the end of a part of the day that its name is doubtful


@dataclass(frozen=True)
class Scene:
    """A landscape that is on screen from ``start`` to ``end`` (seconds)."""

    landscape: str
    start: int
    end: int


@dataclass(frozen=True)
class Event:
    """A shape that crosses one spot of the picture for two seconds from ``start`` on."""

    shape: str
    colour: str
    motion: str
    place: str
    x: float  # centre of a cell of the 8 x 8 grid, fraction of the frame's width
    y: float
    start: int  # seconds
    part_of_day: str
    landscape: str


@dataclass(frozen=True)
class Film:
    """What happens in a film of ``seconds`` seconds; drawing it needs nothing else."""

    seed: int
    seconds: int
    scenes: tuple[Scene, ...]
    events: tuple[Event, ...]
    ball: str  # colour
    ball_rate: tuple[float, float]  # crossings of the picture per second, across and down
    tint: tuple[float, float, float]  # added to every landscape of this film

    @classmethod
    def random(cls, seed: int, seconds: int, events: int | None = None) -> "Film":
        """Draw a film of ``seconds`` seconds; by default one event in four seconds, at most eight.

        Raises:
            ValueError: if the film is too short for its events.
        """
        rng = np.random.default_rng([seed, seconds])
        count = min(len(drawing.SHAPES), max(1, seconds // 4)) if events is None else events
        if count * EVENT_SECONDS > seconds or count > len(drawing.SHAPES):
            raise ValueError(f"{count} events do not fit into a film of {seconds} s with {len(drawing.SHAPES)} shapes")
        scenes = _scenes(rng, seconds)
        shapes = rng.permutation(list(drawing.SHAPES))[:count]
        starts = _event_starts(rng, seconds, count, scenes)
        return cls(
            seed=seed,
            seconds=seconds,
            scenes=scenes,
            events=tuple(_event(rng, str(s), int(t), seconds, scenes) for s, t in zip(shapes, starts, strict=True)),
            ball=str(rng.choice(list(COLOURS))),
            ball_rate=tuple(rng.uniform(0.02, 0.09, 2).tolist()),
            tint=tuple(rng.uniform(-12, 12, 3).tolist()),
        )

    def frame(self, second: float, size: int) -> np.ndarray:
        """The picture at ``second``: (size, size, 3) uint8, RGB."""
        scene = next(s for s in reversed(self.scenes) if s.start <= second)
        day = second / max(self.seconds - 1, 1)
        canvas = drawing.landscape(scene.landscape, day, self.tint, size)
        drawing.ball(canvas, *self.ball_position(second), COLOURS[self.ball])
        for event in self.events:
            if event.start <= second < event.start + EVENT_SECONDS:
                drawing.moving_shape(canvas, event, second - event.start, COLOURS[event.colour], MOTIONS[event.motion])
        return np.clip(canvas, 0, 255).astype(np.uint8)

    def seen(self, seconds: Iterable[float], size: int, drawn: int = FILM_SIZE) -> Tensor:
        """The pictures at ``seconds`` as a tower of ``size`` pixels gets them from a file whose side is ``drawn``.

        Returns:
            (n, 3, size, size) uint8.
        """
        pictures = np.stack([self.frame(second, drawn) for second in seconds])
        return resize_frames(torch.from_numpy(pictures).permute(0, 3, 1, 2), size)

    def ball_position(self, second: float) -> tuple[float, float]:
        """Centre of the ball, which bounces between the edges of the ground."""
        x, y = (abs((second * rate + 0.3 * i) % 2 - 1) for i, rate in enumerate(self.ball_rate))
        return 0.1 + 0.8 * x, 0.34 + 0.56 * y

    def frames(self, size: int, fps: float = 1.0) -> Iterator[np.ndarray]:
        """Every picture of the film at ``fps`` frames per second."""
        for index in range(round(self.seconds * fps)):
            yield self.frame(index / fps, size)

    def one_scene(self, event: Event) -> bool:
        """Whether a single landscape is on screen while ``event`` lasts."""
        return all(not event.start < scene.start < event.start + EVENT_SECONDS for scene in self.scenes)

    def one_part_of_day(self, event: Event) -> bool:
        """Whether the sun tells one part of the day, without doubt, while ``event`` lasts."""
        first, last = (second / max(self.seconds - 1, 1) for second in (event.start, event.start + EVENT_SECONDS - 1))
        return all(last < third - _MARGIN / 2 or first > third + _MARGIN / 2 for third in (1 / 3, 2 / 3))

    def questions(self, rng: np.random.Generator | None = None) -> list[Question]:
        """Every question that this film answers without ambiguity; ``rng`` varies the wording."""
        return ask_about(self, rng)

    def write(self, path: str | Path, size: int = FILM_SIZE, fps: int = 4, progress: bool = True) -> None:
        """Write the film as an H.264 MP4 file of ``size`` x ``size`` pixels."""
        from tqdm import tqdm

        from hourllava.video import write_video

        total = self.seconds * fps
        pictures = tqdm(self.frames(size, fps), "rendering", total, unit="frame", disable=not progress)
        write_video(path, pictures, fps=fps, size=size)


def part_of_day(second: float, seconds: int) -> str:
    """Morning, noon or evening: the thirds of a film."""
    return PARTS_OF_DAY[min(2, int(3 * second / max(seconds, 1)))]


def _scenes(rng: np.random.Generator, seconds: int) -> tuple[Scene, ...]:
    names = rng.permutation(list(drawing.LANDSCAPES))
    count = int(rng.integers(1, min(len(names), max(1, seconds // 5)) + 1)) if seconds < 64 else len(names)
    # Every scene gets at least half of an equal share.
    shares = rng.dirichlet(np.ones(count)) * 0.5 + 0.5 / count
    ends = np.round(np.cumsum(shares) * seconds).astype(int)
    starts = [0, *ends[:-1].tolist()]
    return tuple(Scene(str(n), int(a), int(b)) for n, a, b in zip(names[:count], starts, ends, strict=True))


def _event_starts(rng: np.random.Generator, seconds: int, count: int, scenes: tuple[Scene, ...]) -> np.ndarray:
    """Sorted start seconds: no two events at a time, none over the border of two scenes or of two parts of the day."""
    edge = int(_MARGIN * seconds)
    blocked = {s for third in (seconds // 3, 2 * seconds // 3) for s in range(third - edge, third + edge)}
    if seconds >= 32:  # shorter films have no second to spare
        blocked |= {scene.end - 1 for scene in scenes}
    free = [s for s in range(seconds - 1) if s not in blocked]
    while True:
        starts = np.sort(rng.choice(free, size=count, replace=False))
        if count == 1 or np.diff(starts).min() >= EVENT_SECONDS:
            return starts


def _event(rng: np.random.Generator, shape: str, start: int, seconds: int, scenes: tuple[Scene, ...]) -> Event:
    place = str(rng.choice(list(PLACES)))
    right, bottom = PLACES[place]
    return Event(
        shape=shape,
        colour=str(rng.choice(list(COLOURS))),
        motion=str(rng.choice(list(MOTIONS))),
        place=place,
        x=(float(rng.integers(1, 3)) + 4 * right + 0.5) / 8,
        y=(float(rng.integers(2, 4)) + 3 * bottom + 0.5) / 8,
        start=start,
        part_of_day=part_of_day(start + 0.5, seconds),
        landscape=next(s.landscape for s in reversed(scenes) if s.start <= start),
    )
