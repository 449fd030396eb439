# SPDX-License-Identifier: Apache-2.0
"""Single pictures of a video are those that reading all of it gives, whatever is decoded for them."""

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from clips import SIDE, cut, damage, number_on, write_clip
from torch import from_numpy

from hourllava.errors import VideoError
from hourllava.video import open_video, stills
from hourllava.video.decoder import Decoder
from hourllava.video.plan import make_plan

SECONDS = 40
BOX = (SIDE, SIDE)


def write_film(path: Path, codec: str = "libx264") -> Path:
    """Ten pictures a second, a key picture every two seconds, B-frames in between."""
    return write_clip(path, range(10 * SECONDS), Fraction(1, 10), codec, {"g": "20", "bf": "2"})


def every_second(path: Path) -> list[np.ndarray]:
    return [frame.permute(1, 2, 0).numpy() for chunk in open_video(path).chunks(SIDE) for frame in chunk.frames]


def film_of_kind(kind: str, folder: Path) -> Path:
    match kind:
        case "whole":
            return write_film(folder / "film.mp4")
        case "transport stream":
            return write_film(folder / "film.ts")
        case "cut":
            return cut(write_film(folder / "film.mkv"), folder / "cut.mkv", 0.7)
        case "damaged":
            whole = write_film(folder / "film.mp4")
            return damage(whole, folder / "damaged.mp4", whole.stat().st_size // 5)
        case _:
            return write_film(folder / "film.avi", "mpeg4")


@pytest.mark.parametrize("kind", ["whole", "transport stream", "cut", "damaged", "old codec"])
def test_as_the_reader_gives_them(kind: str, tmp_path: Path) -> None:
    path = film_of_kind(kind, tmp_path)
    expected = every_second(path)
    asked = [len(expected) - 1, 0, 7, 7, len(expected) // 2]
    for second, picture in zip(asked, stills(path, asked, BOX), strict=True):
        assert picture.dtype == np.uint8
        assert np.array_equal(picture, expected[second]), second
    for picture, other in zip(stills(path, range(len(expected)), BOX), expected, strict=True):
        assert np.array_equal(picture, other)


def test_little_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, decoded = write_film(tmp_path / "film.mp4"), []
    pictures = Decoder.pictures

    def counted(self, *bounds):
        for frame in pictures(self, *bounds):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(Decoder, "pictures", counted)
    (picture,) = stills(path, [31], BOX)
    assert number_on(from_numpy(picture).permute(2, 0, 1)) == 310
    assert 0 < len(decoded) <= 20


def test_shape(tmp_path: Path) -> None:
    """A picture keeps its shape inside the box, is never enlarged, and stands upright."""
    path = write_clip(tmp_path / "turned.mp4", [0, 10], Fraction(1, 10), rotation=90)
    assert stills(path, [0], (500, 500))[0].shape == (SIDE, SIDE, 3)
    assert stills(path, [0], (32, 500))[0].shape == (32, 32, 3)
    expected = every_second(path)[0]
    assert np.array_equal(stills(path, [0], BOX)[0], expected)


def test_errors(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4")
    assert stills(path, [], BOX) == []
    with pytest.raises(VideoError, match="it ends at 00:40 and has no picture for 00:40"):
        stills(path, [3, 40], BOX)
    with pytest.raises(VideoError, match="there is no such file"):
        stills(tmp_path / "nothing.mp4", [0], BOX)


def test_a_file_is_read_anew_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, planned = write_film(tmp_path / "film.mp4"), []
    make = make_plan

    def counted(path):
        planned.append(path)
        return make(path)

    monkeypatch.setattr(sys.modules["hourllava.video.stills"], "make_plan", counted)
    for second in (3, 9, 3):
        assert np.array_equal(stills(path, [second], BOX)[0], every_second(path)[second])
    assert planned == [str(path)]
    write_clip(path, range(500, 560), Fraction(1, 10))
    assert np.array_equal(stills(path, [3], BOX)[0], every_second(path)[3])
    assert planned == [str(path)] * 2
    path.unlink()
    with pytest.raises(VideoError, match="no such file"):
        stills(path, [3], BOX)
