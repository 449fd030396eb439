# SPDX-License-Identifier: Apache-2.0
"""`hourllava ask --evidence`: pictures of the top moments, from the video or from where the memory says it is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import SIDE, board, cut
from PIL import Image

import hourllava.cli.ask
from hourllava.cli import main
from hourllava.cli.evidence import CAPTION, strongest_second, tile_corner, write_contact_sheet
from hourllava.memory import VideoMemory
from hourllava.model import Answer, Moment
from hourllava.video import open_video

QUESTIONS = ["Which colour was the star?", "Where was it?"]


def tiles(path: Path, rows: list[int]) -> list[list[np.ndarray]]:
    """The pictures on a sheet, so many in each row."""
    with Image.open(path) as image:
        sheet = np.asarray(image.convert("RGB"))
    found = []
    for row, count in enumerate(rows):
        corners = [tile_corner(row, column, (SIDE, CAPTION)) for column in range(count)]
        found.append([sheet[y : y + SIDE, x : x + SIDE] for x, y in corners])
    return found


def every_second(clip: str) -> list[np.ndarray]:
    return [frame.permute(1, 2, 0).numpy() for chunk in open_video(clip).chunks(SIDE) for frame in chunk.frames]


def ask(source: str | Path, sheet: Path, model: str, capsys: pytest.CaptureFixture[str]) -> list[dict]:
    arguments = ["ask", str(source), *QUESTIONS, "--model", model, "--evidence", str(sheet), "--json"]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["evidence"] == str(sheet)
    return document["answers"]


def test_tiles_are_the_pictures_of_the_moments(
    clip: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet, film = tmp_path / "evidence.png", every_second(clip)
    answers = ask(clip, sheet, model, capsys)
    shown = tiles(sheet, [len(answer["moments"]) for answer in answers])
    assert all(shown)
    for answer, row in zip(answers, shown, strict=True):
        for moment, tile in zip(answer["moments"], row, strict=True):
            inside = answer["mass"][int(moment["start"]) : int(moment["end"])]
            second = int(moment["start"]) + inside.index(max(inside))
            assert np.array_equal(tile, film[second])
    assert not list(tmp_path.glob(".*"))


def test_a_memory_knows_its_video(clip: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film, file, place = tmp_path / "film.mp4", tmp_path / "film.memory", tmp_path / "memories"
    film.write_bytes(Path(clip).read_bytes())
    assert main(["watch", str(film), "-o", str(file), "--model", model]) == 0
    assert main(["watch", str(film), "--into", str(place), "--model", model]) == 0
    capsys.readouterr()
    sheets = [tmp_path / f"{name}.png" for name in ("video", "file", "repository")]
    for source, sheet in zip((film, file, place / "film"), sheets, strict=True):
        ask(source, sheet, model, capsys)
    assert sheets[0].read_bytes() == sheets[1].read_bytes()
    assert sheets[2].stat().st_size > 0

    def refused() -> str:
        sheets[1].write_bytes(b"whole")
        assert main(["ask", str(file), *QUESTIONS, "--model", model, "--evidence", str(sheets[1])]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert sheets[1].read_bytes() == b"whole"
        return err

    cut(Path(clip), film, 0.7)
    assert f"{film} is another: it lasts" in refused()
    film.unlink()
    assert f"pictures need the video, and {film} is not there" in refused()
    memory = VideoMemory.load(file)
    memory.source = None
    memory.save(file)
    assert "this memory does not say where it is" in refused()


def test_a_bad_path_is_refused_before_the_video_is_watched(
    clip: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the video was watched")

    monkeypatch.setattr(hourllava.cli.ask, "take_in", refuse)
    for sheet, why in [
        (tmp_path, "is a directory"),
        (tmp_path / "nowhere" / "sheet.png", "there is no folder"),
        (tmp_path / "sheet.jpg", "let its name end in .png"),
    ]:
        assert main(["ask", clip, *QUESTIONS, "--model", model, "--evidence", str(sheet)]) == 1
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert why in err


def test_the_strongest_second_stands_for_a_moment(clip: str, tmp_path: Path) -> None:
    mass = torch.zeros(20)
    mass[4:8] = torch.tensor([0.1, 0.2, 0.4, 0.1])
    answer = Answer("red", [Moment(4.0, 8.0, 0.8)], mass, {}, [])
    assert strongest_second(answer, answer.moments[0]) == 6
    nothing = Answer("blue", [], torch.zeros(20), {}, [])
    sheet = tmp_path / "sheet.png"
    write_contact_sheet(sheet, [("星は何色 $?", nothing), ("Which colour?" * 50, answer)], Path(clip))
    (_, (tile,)) = tiles(sheet, [0, 1])
    assert np.abs(tile.astype(int) - board(60)).max() < 40
