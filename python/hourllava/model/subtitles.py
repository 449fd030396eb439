# SPDX-License-Identifier: Apache-2.0
"""Subtitles (SRT, WebVTT) that join a question, as the benchmarks with subtitles put them there."""

import os
import re
from dataclasses import dataclass
from html import unescape
from pathlib import Path

from hourllava.errors import InputError

from .forgetting import spread_frames

_INTRODUCTION = "This video's subtitles are listed below:"
_CLOCK = r"(?:(\d+):)?(\d{1,2}):(\d{1,2})(?:[.,](\d{1,3}))?"
_TIMING = re.compile(rf"^\s*{_CLOCK}\s*-->\s*{_CLOCK}(?:\s.*)?$")
_TAG = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")  # <i>, <v Anna>, <00:01.500>, and {\an8} of converted files


@dataclass(frozen=True)
class Cue:
    """One subtitle, on screen for start <= second < end."""

    start: float  # seconds
    end: float
    text: str  # one line, without markup


@dataclass(frozen=True)
class Subtitles:
    """The subtitles of a video, in order of time."""

    cues: tuple[Cue, ...]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Subtitles":
        """Read an SRT or WebVTT file; which of the two is told by its lines, not by its name.

        Raises:
            InputError: there is no such file, it is not UTF-8, or no line of it is the time of a subtitle.
        """
        todo = "give an SRT or WebVTT file in UTF-8"
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise InputError(path, f"it cannot be read ({error.strerror})", "check the path") from error
        except UnicodeDecodeError as error:
            raise InputError(path, "it is not UTF-8 text", todo) from error
        cues = _cues(text)
        if not cues:
            raise InputError(path, "no line in it is the time of a subtitle", todo)
        return cls(tuple(cues))

    def seen(self, frames: int, sampled: int | None = None) -> list[str]:
        """The lines on screen at the seconds that are looked at, each once, in order.

        Args:
            frames: seconds of the video.
            sampled: look at so many of them, spread evenly, as a benchmark with that many frames does; None looks at
                every second.
        """
        count = frames if sampled is None else min(sampled, frames)
        looked_at = spread_frames(frames, count).tolist() if count else []
        shown = []
        for cue in self.cues:
            if any(cue.start <= second < cue.end for second in looked_at):
                shown.append(cue.text)
        return shown

    def join(self, question: str, frames: int, sampled: int | None = None) -> str:
        """The question behind the subtitles of a video of `frames` seconds; itself, if none of them is seen."""
        lines = self.seen(frames, sampled)
        return "\n".join([_INTRODUCTION, *lines, question]) if lines else question


def _cues(text: str) -> list[Cue]:
    """Every cue in the text of a file; a cue ends at an empty line or at the next cue's time."""
    cues: list[Cue] = []
    lines = text.splitlines()
    timed = [(number, match) for number, line in enumerate(lines) if (match := _TIMING.match(line))]
    ends = [*(number for number, _ in timed), len(lines)][1:]
    for (number, match), following in zip(timed, ends, strict=True):
        body = []
        for line in lines[number + 1 : following]:
            if not line.strip():
                break
            body.append(line)
        spoken = " ".join(" ".join(unescape(_TAG.sub("", line)) for line in body).split())
        start, end = _seconds(match.groups()[:4]), _seconds(match.groups()[4:])
        if spoken and end > start:
            cues.append(Cue(start, end, spoken))
    return sorted(cues, key=lambda cue: cue.start)


def _seconds(clock: tuple[str | None, ...]) -> float:
    hours, minutes, seconds = (int(part or 0) for part in clock[:3])
    return 3600 * hours + 60 * minutes + seconds + int((clock[3] or "0").ljust(3, "0")) / 1000
