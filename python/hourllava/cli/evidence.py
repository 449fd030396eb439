# SPDX-License-Identifier: Apache-2.0
"""A contact sheet: for each answer, the pictures of the moments that it rests on most."""

import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from hourllava.cli.watch import is_kept
from hourllava.errors import HourLlavaError
from hourllava.video import open_video, stills

if TYPE_CHECKING:
    from hourllava.memory import ShardedMemory, VideoMemory
    from hourllava.model import Answer, Moment

BOX = (180, 320)  # most rows and columns of a picture
CAPTION = 160  # columns that a caption takes
MARGIN, LINE = 12, 22  # between tiles, and of a line of text
INK, PAPER = "#1d2a3f", "#ffffff"


def film_of(video: Path, memory: "VideoMemory | ShardedMemory") -> Path:
    """The file that pictures can come from: the video that is asked, or the one that a kept memory was made of.

    Raises:
        HourLlavaError: the memory does not say which, the file is gone, or it is shorter than the memory.
    """
    if not is_kept(video):
        return video
    todo = "ask the video file itself, or leave --evidence out"
    if memory.source is None:
        raise HourLlavaError(video, "pictures need the video, and this memory does not say where it is", todo)
    film = Path(memory.source)
    if not film.is_file():
        raise HourLlavaError(video, f"pictures need the video, and {film} is not there", todo)
    held = open_video(film).frames_expected
    if held < memory.frames:
        why = f"pictures need the video, and {film} is another: it lasts {held} s, the memory {memory.frames} s"
        raise HourLlavaError(video, why, todo)
    return film


def write_contact_sheet(path: Path, asked: list[tuple[str, "Answer"]], film: Path) -> None:
    """Write one row a question: the picture of the strongest second of each moment, with its time and share under it.

    Args:
        path: the PNG to write; it is replaced when the new one is whole.
        asked: questions and their answers.
        film: the video that they are about.

    Raises:
        VideoError: a picture cannot be read.
    """
    seconds = [strongest_second(answer, moment) for _, answer in asked for moment in answer.moments]
    found = stills(film, seconds, BOX)
    tile = max([0, *(len(picture) for picture in found)]), max([CAPTION, *(picture.shape[1] for picture in found)])
    pictures, columns = iter(found), max([1, *(len(answer.moments) for _, answer in asked)])
    width, height = tile_corner(len(asked), columns, tile)
    sheet = Image.new("RGB", (width, height - LINE), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.truetype(findfont("DejaVu Sans"), 14)
    for row, (question, answer) in enumerate(asked):
        x, y = tile_corner(row, 0, tile)
        title = textwrap.shorten(f"{question}  →  {answer.text}", columns * tile[1] // 8)
        draw.text((x, y - LINE), title if answer.moments else f"{title}  (rests on nothing)", INK, font)
        for column, moment in enumerate(answer.moments):
            x, y = tile_corner(row, column, tile)
            sheet.paste(Image.fromarray(next(pictures)), (x, y))
            draw.text((x, y + tile[0] + 2), f"{moment}   {moment.share:.0%}", INK, font)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        sheet.save(partial, "PNG")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def strongest_second(answer: "Answer", moment: "Moment") -> int:
    """The second of a moment that has the largest share of attention."""
    first, end = int(moment.start), int(moment.end)
    return first + int(answer.mass[first:end].argmax())


def tile_corner(row: int, column: int, tile: tuple[int, int]) -> tuple[int, int]:
    """Where the upper left corner of a tile (rows, columns) stands on the sheet: (x, y)."""
    return MARGIN + column * (tile[1] + MARGIN), MARGIN + row * (LINE + tile[0] + LINE + MARGIN) + LINE
