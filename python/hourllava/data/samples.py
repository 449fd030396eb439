# SPDX-License-Identifier: Apache-2.0
"""Conversations about images and videos, read from LLaVA-style JSON and from VideoMarathon's rows."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from hourllava.errors import DataError
from hourllava.memory import Repository
from hourllava.model.prompt import IMAGE, is_whole
from hourllava.video import FrameFolder, VideoReader, open_video

from .manifest import Entry

_ROLES = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer"}
_NOISE = "QA_GT_caption_based_noisy"  # a label that LLaVA-Hound's files left in their text
_SHAPE = 'give {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}'


@dataclass(frozen=True, slots=True)
class Media:
    """What an `<image>` mark stands for."""

    kind: Literal["image", "video", "features"]
    path: Path  # a file; features: a folder of a repository, or a .pt file
    name: str = ""  # of a video's memory in a repository
    fps: float = 1.0  # frames a second of a video that is a folder of frames

    def open(self) -> VideoReader | FrameFolder:
        """A reader of the video: a file, or a folder of frames.

        Raises:
            VideoError: it cannot be read.
        """
        return FrameFolder(self.path, self.fps) if self.path.is_dir() else open_video(self.path)


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation about one video, one image, several images, or nothing to see."""

    id: str
    turns: tuple[tuple[str, str], ...]  # questions, with an `<image>` mark for each medium, and their answers
    media: tuple[Media, ...]
    source: str  # file:line or file#number, for messages
    stream: str = ""

    @property
    def named(self) -> str:
        """How messages name it: by its place, and its id if it has one."""
        return self.source if self.id == self.source else f"{self.source} (id {self.id})"


@dataclass(frozen=True)
class Places:
    """Where a manifest's media are.

    Args:
        root: the folder that images and videos are named from.
        features: a repository of memories, or a folder of the original's .pt files; videos are then not decoded.
        fps: frames a second of videos that are folders of frames.
    """

    root: Path
    features: Path | None = None
    fps: float = 1.0

    @cached_property
    def in_repository(self) -> bool:
        return self.features is not None and Repository.is_at(self.features)


def memory_name(video: str) -> str:
    """What a repository calls the memory of a video that a manifest names `video`: a folder's name, one to one."""
    name = quote(video, safe=" ", errors="surrogateescape")  # as file names come whose bytes are no UTF-8
    return f"%2E{name[1:]}" if name.startswith(".") else name


def to_sample(entry: Entry, places: Places, stream: str = "") -> Sample:
    """Check an entry of a manifest.

    One `<image>` mark that is not at the start of its question is moved there, onto a line of its own, and a single
    image or video without a mark gets one at the start of the first question, as the original does. A system message
    at the start is left out, since the model has its own, and so is an answer there, as in the original.

    Raises:
        DataError: it is no conversation, an answer has no question, or marks and media do not match; the message names
            file and line, and the id if there is one.
    """
    if isinstance(entry.value, DataError):
        raise entry.value
    value = entry.value
    if not isinstance(value, dict):
        raise DataError(entry.source, f"it is {type(value).__name__}, not a conversation", _SHAPE)
    identity = value.get("id")
    what = entry.source if identity is None else f"{entry.source} (id {identity})"
    media = _media(value, places, what)
    turns = _turns(value.get("conversations"), what)
    marks = sum(question.count(IMAGE) for question, _ in turns)
    if len(media) == 1 and marks == 0:
        turns[0] = (f"{IMAGE}\n{turns[0][0]}", turns[0][1])
        marks = 1
    if marks != len(media):
        seen = ", ".join(sorted({medium.kind for medium in media})) or "media"
        why = f"{IMAGE} stands in its questions {marks} times for {len(media)} {seen}"
        raise DataError(what, why, "give one mark for each, or the media that are missing")
    return Sample(entry.source if identity is None else str(identity), tuple(turns), tuple(media), entry.source, stream)


def _turns(conversation: Any, what: str) -> list[tuple[str, str]]:
    """Questions and answers by turns."""
    if not isinstance(conversation, list) or not conversation:
        raise DataError(what, "it has no list of conversations", _SHAPE)
    messages = [_message(message, number, what) for number, message in enumerate(conversation)]
    skipped = int(messages[0][0] == "system")
    skipped += int(len(messages) > skipped + 1 and messages[skipped][0] == "answer")
    messages = messages[skipped:]
    for place, (role, text) in enumerate(messages):
        number = place + skipped
        if role != ("question", "answer")[place % 2]:
            fault = {"answer": "an answer has no question", "question": "a question has no answer"}
            why = f"{fault.get(role, 'a system message stands between others')} (message {number})"
            raise DataError(what, why, "let human and gpt take turns, human first")
        if role == "answer" and (IMAGE in text or not text.strip()):
            why = f"an answer holds an {IMAGE} mark" if text.strip() else "an answer is empty"
            raise DataError(what, f"{why} (message {number})", "put marks into questions, and give every answer a text")
    if not messages or len(messages) % 2:
        raise DataError(what, "its last question has no answer", "give it one, or leave it out")
    texts = [text for _, text in messages]
    return list(zip(texts[::2], texts[1::2], strict=True))


def _message(message: Any, number: int, what: str) -> tuple[str, str]:
    role, text = (message.get("from"), message.get("value")) if isinstance(message, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(text, str):
        raise DataError(what, f"message {number} has no sender or no text", _SHAPE)
    if role not in (*_ROLES, "system"):
        raise DataError(what, f"message {number} is from {role!r}", f"choose from {', '.join(_ROLES)}, system")
    if not is_whole(text):
        why = f"message {number} holds half of a character (a lone surrogate)"
        raise DataError(what, why, "write its text again in UTF-8, or leave it out")
    text = text.replace(_NOISE, "")
    if text.count(IMAGE) == 1 and not text.startswith(IMAGE) and _ROLES.get(role) == "question":
        text = f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()
    return _ROLES.get(role, role), text


def _media(value: dict[str, Any], places: Places, what: str) -> list[Media]:
    given = {kind: _names(value.get(kind), kind, what) for kind in ("image", "video", "features")}
    kinds = [kind for kind, names in given.items() if names]
    if len(kinds) > 1:
        why = f"it has {' and '.join(kinds)}"
        raise DataError(what, why, "give a conversation one video, its features, or images")
    if len(given["video"]) > 1 or len(given["features"]) > 1:
        raise DataError(what, f"it has {len(given[kinds[0]])} videos", "give a conversation one")
    if given["image"]:
        return [Media("image", places.root / name) for name in given["image"]]
    if given["features"]:
        return [Media("features", places.root / given["features"][0])]
    folder = value.get("data_source")
    if isinstance(folder, str):
        _names(folder, "data_source", what)
    return [_video(name, folder, places) for name in given["video"]]


def _video(name: str, folder: Any, places: Places) -> Media:
    """A video, `data_source`/`video` below the root, or the features that were made of it."""
    if isinstance(folder, str) and folder and not name.startswith(f"{folder}/"):
        name = os.path.join(folder, name)
    held = memory_name(name)
    if places.features is None:
        return Media("video", places.root / name, held, places.fps)
    if places.in_repository:
        return Media("features", places.features / held, held)
    return Media("features", (places.features / name).with_suffix(".pt"), held)


def _names(given: Any, kind: str, what: str) -> list[str]:
    names = given if isinstance(given, list) else [given] if given not in (None, "") else []
    if not all(map(_is_name, names)):
        raise DataError(what, f"its {kind} is no file name", f'give "{kind}": "a/file" or a list of them')
    return names


def _is_name(name: Any) -> bool:
    """Whether a file can have this name, UTF-8 or not: JSON's escapes can spell letters that no file system has."""
    try:
        return isinstance(name, str) and name != "" and b"\0" not in name.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False
