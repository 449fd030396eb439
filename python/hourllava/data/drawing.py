# SPDX-License-Identifier: Apache-2.0
"""Pictures in numpy, with soft edges, at any size: landscapes under a moving sun, balls and small shapes.

Coordinates are fractions of the frame, x to the right and y down. A canvas is (size, size, 3) float32, 0 to 255.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from hourllava.data.film import Event

HORIZON = 0.25  # sky above, ground below
SHAPE_RADIUS = 0.08  # of the frame
LANDSCAPES = {
    "sea": (30, 120, 150),
    "forest": (25, 85, 40),
    "desert": (205, 175, 120),
    "snow": (225, 232, 240),
    "city": (115, 115, 120),
    "meadow": (125, 190, 80),
}
_SKY = np.array([(255, 170, 150), (140, 200, 250), (90, 60, 110)], np.float32)  # morning, noon, evening
_SUN = (255, 250, 190)


@lru_cache(maxsize=16)
def _pixels(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the pixels: y (size, 1) and x (1, size)."""
    centre = (np.arange(size, dtype=np.float32) + 0.5) / size
    return centre[:, None], centre[None, :]


@lru_cache(maxsize=64)
def _ground(name: str, size: int) -> np.ndarray:
    """The ground of a landscape with its texture: (size, size, 3) float32."""
    y, x = _pixels(size)
    texture = {
        "sea": np.sin(60 * y + 3 * np.sin(9 * x)),
        "forest": np.sin(70 * x) * np.cos(30 * y + 12 * x),
        "desert": np.sin(14 * y + 5 * np.sin(5 * x)),
        "snow": np.cos(23 * x + 31 * y) * 0.4,
        "city": np.sign(np.sin(25 * x)) * np.sign(np.sin(25 * y)),
        "meadow": np.sin(45 * (x + y)) * np.sin(38 * (x - y)) * 0.7,
    }[name]
    shade = 13 * np.broadcast_to(texture, (size, size))
    return np.asarray(LANDSCAPES[name], np.float32) + shade[..., None].astype(np.float32)


def landscape(name: str, day: float, tint: tuple[float, float, float], size: int) -> np.ndarray:
    """A new canvas: ground ``name``, the sky and the sun when ``day`` (0 to 1) of the day has passed."""
    canvas = _ground(name, size) + np.asarray(tint, np.float32)
    rows = round(HORIZON * size)
    part = min(max(2 * day, 0), 2)
    low = min(int(part), 1)
    canvas[:rows] = _SKY[low] + (part - low) * (_SKY[low + 1] - _SKY[low])
    _paint(canvas, 0.05 + 0.9 * day, 0.11, 0.06, "disc", _SUN, 1.0)
    return canvas


def ball(canvas: np.ndarray, x: float, y: float, colour: tuple[int, int, int]) -> None:
    """A ball with a pale rim, so that it is no event."""
    _paint(canvas, x, y, 0.095, "disc", (245, 245, 245), 1.0)
    _paint(canvas, x, y, 0.07, "disc", colour, 1.0)


def moving_shape(
    canvas: np.ndarray, event: "Event", age: float, colour: tuple[int, int, int], direction: tuple[int, int]
) -> None:
    """The shape of ``event``, ``age`` seconds after it appeared, with a fading trail behind it."""
    travel = 0.03 * (age - 0.5)
    x, y = event.x + direction[0] * travel, event.y + direction[1] * travel
    for behind, strength in ((3, 0.22), (2, 0.35), (1, 0.5), (0, 1.0)):
        back = 0.055 * behind
        _paint(canvas, x - direction[0] * back, y - direction[1] * back, SHAPE_RADIUS, event.shape, colour, strength)


def _paint(
    canvas: np.ndarray, x: float, y: float, radius: float, shape: str, colour: tuple[int, int, int], strength: float
) -> None:
    """Blend ``shape`` into the window of the canvas that it covers."""
    size = canvas.shape[0]
    top, left = (max(0, int((c - 1.3 * radius) * size)) for c in (y, x))
    bottom, right = (min(size, int((c + 1.3 * radius) * size) + 2) for c in (y, x))
    rows, columns = _pixels(size)
    v, u = (rows[top:bottom] - y) / radius, (columns[:, left:right] - x) / radius
    # Signed distance in shape radii to coverage, over one pixel's width.
    cover = np.clip(0.5 - SHAPES_AND_DISC[shape](u, v) * radius * size, 0, 1)[..., None] * strength
    window = canvas[top:bottom, left:right]
    window += cover * (np.asarray(colour, np.float32) - window)


def _box(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v) - 0.95


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    angle = np.arctan2(u, -v)
    return np.hypot(u, v) - (0.68 + 0.42 * np.cos(5 * angle))


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    lobes = np.hypot(np.abs(u) - 0.45, v + 0.3) - 0.5
    point = np.maximum((np.abs(u) + v - 0.75) / 1.4, -v - 0.3)
    return np.minimum(lobes, point)


SHAPES = {
    "square": lambda u, v: _box(u, v, 0.8, 0.8),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.7) - 0.24,
    "cross": lambda u, v: np.minimum(_box(u, v, 0.28, 0.95), _box(u, v, 0.95, 0.28)),
    "triangle": lambda u, v: np.maximum(0.88 * np.abs(u) + 0.47 * v - 0.42, v - 0.75),
    "diamond": lambda u, v: 0.75 * np.abs(u) + 0.5 * np.abs(v) - 0.5,
    "star": _star,
    "heart": _heart,
    "moon": lambda u, v: np.maximum(_disc(u, v), 0.75 - np.hypot(u - 0.55, v)),
}
SHAPES_AND_DISC = {**SHAPES, "disc": _disc}
