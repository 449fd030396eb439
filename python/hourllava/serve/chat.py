# SPDX-License-Identifier: Apache-2.0
"""Chat messages as a question: about one video, about images, or about nothing to see."""

from dataclasses import dataclass, field
from typing import Any

from hourllava.errors import InputError, QuestionError
from hourllava.model import AskOptions
from hourllava.model.prompt import check_text

from .schemas import AssistantMessage, ChatRequest, ImagePart, Message, SystemMessage, TextPart, UserMessage, VideoPart


@dataclass(frozen=True)
class VideoAsked:
    """The video of a conversation: where it comes from, what its memory is called, or both."""

    source: str | None
    name: str | None


@dataclass(frozen=True)
class Conversation:
    """What a client wants to know, checked."""

    question: str
    history: tuple[tuple[str, str], ...] = ()  # earlier questions and answers
    system: str | None = None
    video: VideoAsked | None = None
    # As a chat template takes them, but an image is still {"type": "image", "url": ...}.
    messages: list[dict[str, Any]] = field(default_factory=list)

    def options(self, budget: str | None) -> AskOptions:
        """How the model is asked; for more than one token of an answer the engine sees to it that there is room."""
        return AskOptions(1, history=self.history, system=self.system, budget=budget)


def read_conversation(request: ChatRequest) -> Conversation:
    """The conversation that the messages of a request are.

    Raises:
        QuestionError: nothing is asked, turns do not alternate, or a text holds marks of the prompt.
        InputError: there are two videos, images beside a video, or a budget or evidence without a video.
    """
    system, rest = _system_of(request.messages)
    turns = _alternating(rest)
    for text in (system or "", *(_text(turn) for turn in turns)):
        check_text(text)
    asked = [_text(turn).strip() for turn in turns]
    if not all(asked[::2]):
        raise QuestionError("messages", "a question is empty", "ask something")
    video = _video_of(turns)
    pictured = any(isinstance(part, ImagePart) for turn in turns for part in turn)
    if video and pictured:
        raise InputError("messages", "they show a video and images", "ask about one or the other")
    if not video and (request.budget or request.evidence):
        raise InputError(
            "budget and evidence", "they are about the memory of a video", "name a video, or leave them out"
        )
    history = tuple(zip(asked[:-1:2], (_text(turn) for turn in turns[1::2]), strict=True))
    messages = [] if video else _messages(system, turns)
    return Conversation(asked[-1], history, system, video, messages)


Turn = list[TextPart | VideoPart | ImagePart]


def _system_of(messages: list[Message]) -> tuple[str | None, list[UserMessage | AssistantMessage]]:
    """The system message, all that come first joined, and what follows."""
    texts, rest = list[str](), list[UserMessage | AssistantMessage]()
    for message in messages:
        if not isinstance(message, SystemMessage):
            rest.append(message)
        elif rest:
            raise QuestionError("messages", "a system message stands behind others", "let it come first")
        else:
            texts.append(_text(message.content))
    return "\n".join(texts) if texts else None, rest


def _alternating(messages: list[UserMessage | AssistantMessage]) -> list[Turn]:
    """The parts of questions and answers in turn, the last one a question; neighbouring questions are one."""
    turns: list[Turn] = []
    for message in messages:
        asks, due = isinstance(message, UserMessage), len(turns) % 2 == 0
        if asks == due:
            turns.append(list(message.content))
        elif asks:
            turns[-1] += message.content
        else:
            raise QuestionError("messages", "an answer follows no question", "let user and assistant take turns")
    if len(turns) % 2 == 0:
        raise QuestionError("messages", "the last one asks nothing", "let the user's question come last")
    return turns


def _text(parts: "list[TextPart] | Turn") -> str:
    return "\n".join(part.text for part in parts if isinstance(part, TextPart) and part.text)


def _video_of(turns: list[Turn]) -> VideoAsked | None:
    """The one video that a conversation names, however often."""
    named = [part for turn in turns for part in turn if isinstance(part, VideoPart)]
    sources = {part.video_url.url for part in named if part.video_url}
    names = {part.uuid for part in named if part.uuid}
    # A part that has only a source and one that has only a name are two, for all that is known here.
    split = len(named) > 1 and not any(part.uuid for part in named if part.video_url) and sources and names
    if len(sources) > 1 or len(names) > 1 or split:
        raise InputError("messages", "they show more than one video", "ask about one of them at a time")
    if not named:
        return None
    return VideoAsked(next(iter(sources), None), next(iter(names), None))


def _messages(system: str | None, turns: list[Turn]) -> list[dict[str, Any]]:
    """The same as a chat template takes them."""
    roles = ("user", "assistant")
    spoken = [{"role": roles[n % 2], "content": [_part(p) for p in turn]} for n, turn in enumerate(turns)]
    return spoken if system is None else [{"role": "system", "content": [_written(system)]}, *spoken]


def _part(part: TextPart | VideoPart | ImagePart) -> dict[str, Any]:
    if isinstance(part, ImagePart):
        return {"type": "image", "url": part.image_url.url}
    assert isinstance(part, TextPart)
    return _written(part.text)


def _written(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
