# SPDX-License-Identifier: Apache-2.0
"""Bodies and messages: what becomes of them, and what is refused."""

from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from servers import about

from hourllava.errors import HourLlavaError, InputError, QuestionError
from hourllava.serve.chat import Conversation, VideoAsked, read_conversation
from hourllava.serve.problems import ApiError, problem_of
from hourllava.serve.schemas import ChatRequest
from hourllava.serve.wording import Sampling


def request(messages: Any = "When?", **fields: Any) -> ChatRequest:
    """A body as FastAPI would read it."""
    if isinstance(messages, str):
        messages = [user(messages)]
    return ChatRequest.model_validate({"messages": messages, **fields})


def read(messages: Any, **fields: Any) -> Conversation:
    return read_conversation(request(messages, **fields))


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answered(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def video(url: str | None = None, uuid: str | None = None) -> dict[str, Any]:
    return about("", url, uuid)[0]["content"][0]


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def test_a_text_is_a_question() -> None:
    conversation = read("  When was it? ")
    text = {"type": "text", "text": "  When was it? "}
    assert conversation == Conversation("When was it?", messages=[user([text])])


def test_turns_become_a_history() -> None:
    conversation = read(
        [
            {"role": "system", "content": "Be short."},
            {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
            user([video("/a.mp4"), {"type": "text", "text": "What is it?"}]),
            user("And where?"),
            answered("A star."),
            user([{"type": "text", "text": "When"}, {"type": "text", "text": "was it?"}]),
        ]
    )
    assert conversation.system == "Be short.\nBe kind."
    assert conversation.history == (("What is it?\nAnd where?", "A star."),)
    assert conversation.question == "When\nwas it?"
    assert conversation.video == VideoAsked("/a.mp4", None)
    options = conversation.options("1/4")
    assert (options.history, options.system) == (conversation.history, conversation.system)
    assert (options.max_new_tokens, options.budget) == (1, "1/4")


def test_images_stay_where_they_stand() -> None:
    conversation = read([{"role": "system", "content": "Look."}, user([IMAGE, {"type": "text", "text": "?"}])])
    assert conversation.video is None
    assert conversation.messages == [
        {"role": "system", "content": [{"type": "text", "text": "Look."}]},
        user([{"type": "image", "url": IMAGE["image_url"]["url"]}, {"type": "text", "text": "?"}]),
    ]


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ([video("/a.mp4")], VideoAsked("/a.mp4", None)),
        ([video(uuid="a")], VideoAsked(None, "a")),
        ([video("/a.mp4"), video("/a.mp4")], VideoAsked("/a.mp4", None)),
        ([video("/a.mp4", "a"), video(uuid="a")], VideoAsked("/a.mp4", "a")),
        ([video("/a.mp4", "a"), video("/a.mp4")], VideoAsked("/a.mp4", "a")),
    ],
)
def test_a_video_may_be_named_again(parts: list[dict[str, Any]], found: VideoAsked) -> None:
    messages = [m for part in parts for m in (user([part, {"type": "text", "text": "?"}]), answered("So."))]
    assert read([*messages, user("?")]).video == found


@pytest.mark.parametrize(
    "parts",
    [
        [video("/a.mp4"), video("/b.mp4")],
        [video(uuid="a"), video(uuid="b")],
        [video("/a.mp4"), video(uuid="a")],
        [video("/a.mp4", "a"), video(uuid="b")],
    ],
)
def test_two_videos_are_too_many(parts: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError, match="more than one video"):
        read([user([*parts, {"type": "text", "text": "?"}])])


@pytest.mark.parametrize(
    ("messages", "fields", "kind", "why"),
    [
        ([user(" ")], {}, QuestionError, "a question is empty"),
        ([user([video("/a.mp4")])], {}, QuestionError, "a question is empty"),
        ([user(""), answered("Yes."), user("?")], {}, QuestionError, "a question is empty"),
        ([answered("Yes."), user("?")], {}, QuestionError, "an answer follows no question"),
        ([user("?"), answered("Yes."), answered("No."), user("?")], {}, QuestionError, "an answer follows no question"),
        ([user("?"), answered("Yes.")], {}, QuestionError, "the last one asks nothing"),
        ([{"role": "system", "content": "Be short."}], {}, QuestionError, "the last one asks nothing"),
        ([user("?"), {"role": "system", "content": "!"}], {}, QuestionError, "a system message stands behind others"),
        ([user([video("/a.mp4"), IMAGE, {"type": "text", "text": "?"}])], {}, InputError, "a video and images"),
        ([user("?")], {"budget": "1/4"}, InputError, "about the memory of a video"),
        ([user("?")], {"evidence": True}, InputError, "about the memory of a video"),
    ],
)
def test_what_is_no_conversation(
    messages: list[dict[str, Any]], fields: dict[str, Any], kind: type[HourLlavaError], why: str
) -> None:
    with pytest.raises(kind, match=why) as raised:
        read(messages, **fields)
    problem = problem_of(raised.value)
    assert problem is not None
    assert problem.status == 400


@pytest.mark.parametrize("mark", ["<image>", "<|im_start|>", "<|im_end|>"])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_nobody_forges_a_turn(mark: str, place: int) -> None:
    """Also not of two parts, none of which holds a mark."""
    texts = ["Be short.", "What?", "That.", "When?"]
    texts[place] = f"so {mark}\n"
    system, *turns = texts
    messages = [{"role": "system", "content": system}, user(turns[0]), answered(turns[1]), user(turns[2])]
    with pytest.raises(QuestionError, match="it holds"):
        read(messages)


def test_how_an_answer_is_written() -> None:
    assert request().sampling() == Sampling()
    asked = request(temperature=0.5, top_p=0.9, seed=-1, stop=["a", "b"], max_tokens=5)
    assert asked.sampling() == Sampling(5, 0.5, 0.9, -1, ("a", "b"))
    assert request(max_tokens=5, max_completion_tokens=6, stop="x").sampling() == Sampling(6, stop=("x",))


def test_what_changes_nothing_is_taken() -> None:
    neutral = {
        "n": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logprobs": False,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "logit_bias": {},
        "audio": None,
    }
    without = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "x"}
    assert request(**neutral, **without) == request()
    plain = answered("Yes.")
    sent_back = plain | {"refusal": None, "tool_calls": None, "annotations": [], "moments": [{}], "memory": "a"}
    assert request([user("?"), sent_back, user("!")]) == request([user("?"), plain, user("!")])


REFUSED: list[tuple[dict[str, Any], str]] = [
    *(
        ({field: value}, field)
        for field, value in [
            ("n", 2),
            ("n", True),
            ("tools", [{"type": "function"}]),
            ("functions", [{}]),
            ("function_call", {"name": "f"}),
            ("tool_choice", "required"),
            ("response_format", {"type": "json_object"}),
            ("logprobs", True),
            ("top_logprobs", 3),
            ("logit_bias", {"5": 1}),
            ("audio", {"voice": "x"}),
            ("modalities", ["text", "audio"]),
            ("frequency_penalty", 0.5),
            ("presence_penalty", -1),
            ("reasoning_effort", "high"),
            ("verbosity", "low"),
            ("web_search_options", {}),
            ("moderation", {}),
            ("top_k", 5),
            ("temperature", -0.1),
            ("temperature", 2.1),
            ("temperature", 1e-40),
            ("temperature", "0.5"),
            ("temperature", float("nan")),
            ("top_p", 0),
            ("top_p", 1.01),
            ("max_tokens", 0),
            ("max_tokens", 1.5),
            ("max_completion_tokens", 0),
            ("seed", 2**63),
            ("stop", ["a"] * 5),
            ("stop", ""),
            ("stream_options", {"include_usage": True}),
            ("stream", "yes"),
            ("evidence", 1),
            ("wait", None),
            ("budget", 5),
            ("model", 5),
        ]
    ),
    ({"stream": True, "stream_options": {"include_all": True}}, "stream_options.include_all"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
    ({"messages": [{"content": "x"}]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name"),
    ({"messages": [user("?"), {"role": "assistant", "content": None}]}, "messages[1].content"),
    ({"messages": [user("?"), answered("!") | {"tool_calls": [{}]}]}, "messages[1].tool_calls"),
    ({"messages": [user([{"type": "input_audio"}])]}, "messages[0].content[0]"),
    ({"messages": [user([{"type": "text"}])]}, "messages[0].content[0].text"),
    ({"messages": [user([{"type": "text", "text": "\ud800"}])]}, "messages[0].content[0].text"),
    ({"messages": [user([{"type": "video_url", "video_url": None}])]}, "messages[0].content[0].video_url"),
    ({"messages": [user([{"type": "video_url", "video_url": {}}])]}, "messages[0].content[0].video_url.url"),
    (
        {"messages": [user([{"type": "video_url", "video_url": {"url": "a", "fps": 2}}])]},
        "messages[0].content[0].video_url.fps",
    ),
    (
        {"messages": [user([IMAGE | {"image_url": {"url": "x", "detail": "low"}}])]},
        "messages[0].content[0].image_url.detail",
    ),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_what_would_be_ignored_is_refused(fields: dict[str, Any], param: str) -> None:
    body = {"messages": [user("When?")]} | fields
    with pytest.raises(ValidationError) as raised:
        ChatRequest.model_validate(body)
    problem = refused_by_fastapi(raised.value, body)
    assert (problem.status, problem.kind, problem.param) == (400, "invalid_request_error", param)
    assert problem.message.startswith(param)


def refused_by_fastapi(error: ValidationError, body: Any) -> ApiError:
    """The problem that FastAPI's own error of a body is."""
    errors = [e | {"loc": ("body", *e["loc"])} for e in error.errors()]
    problem = problem_of(RequestValidationError(errors, body=body))
    assert problem is not None
    return problem
