# SPDX-License-Identifier: Apache-2.0
"""Subtitles of files as they are found: times, markup, order, and the lines that a model looks at."""

import pytest

from hourllava.errors import InputError
from hourllava.model.subtitles import Cue, Subtitles

SRT = """\ufeff1
00:00:01,000 --> 00:00:03,500
<i>Good morning,</i>
Anna.

2
00:00:03,900 --> 00:00:04,100 X1:10 Y1:20
{\\an8}Look &amp; see <font color="white" size=".72c">this</font>!

3
01:00:02,5 --> 01:00:04,000
At last
"""

VTT = """WEBVTT - a film

STYLE
::cue { color: red }

NOTE 00:01 was cut
later

intro
00:01.000 --> 00:03.500 align:start position:10%
<v Anna>Good <00:02.000><c.loud>morning</c>

01:00:02.500 --> 01:00:04.000
At last
00:10.000 --> 00:12.000
in between
"""


def write(folder, text, **how):
    path = folder / "film.txt"
    path.write_text(text, **how)
    return path


def test_srt(tmp_path):
    assert Subtitles.read(write(tmp_path, SRT, encoding="utf-8")).cues == (
        Cue(1.0, 3.5, "Good morning, Anna."),
        Cue(3.9, 4.1, "Look & see this!"),
        Cue(3602.5, 3604.0, "At last"),
    )


def test_vtt(tmp_path):
    assert Subtitles.read(write(tmp_path, VTT)).cues == (
        Cue(1.0, 3.5, "Good morning"),
        Cue(10.0, 12.0, "in between"),
        Cue(3602.5, 3604.0, "At last"),
    )


def test_windows_line_ends(tmp_path):
    path = tmp_path / "film.srt"
    path.write_bytes(b"1\r\n00:00:01,000 --> 00:00:02,000\r\nHello\r\n\r\n2\r\n00:00:02,000 --> 00:00:03,000\r\n\r\n")
    assert Subtitles.read(path).cues == (Cue(1.0, 2.0, "Hello"),)


CUES = Subtitles((Cue(0.0, 1.0, "a"), Cue(1.2, 1.8, "between"), Cue(2.0, 5.0, "b"), Cue(9.0, 20.0, "c")))


def test_lines_on_screen_at_the_seconds_that_are_looked_at():
    assert CUES.seen(10) == ["a", "b", "c"]  # nothing is seen of what comes and goes between two frames
    assert CUES.seen(9) == ["a", "b"]
    assert CUES.seen(10, sampled=2) == ["a", "c"]
    assert CUES.seen(10, sampled=100) == ["a", "b", "c"]
    assert CUES.seen(0) == []


def test_they_stand_before_the_question():
    assert CUES.join("Who?", 5) == "This video's subtitles are listed below:\na\nb\nWho?"
    assert Subtitles(()).join("Who?", 5) == "Who?"


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"Dear diary.\n", "no line in it"), (b"", "no line in it"), ("Ä".encode("latin-1"), "not UTF-8"), (None, "read")],
)
def test_what_are_no_subtitles(tmp_path, content, why):
    path = tmp_path / "film.srt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=why) as caught:
        Subtitles.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
