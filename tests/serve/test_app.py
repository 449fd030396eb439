# SPDX-License-Identifier: Apache-2.0
"""The routes, the errors and who may ask, of a server whose engine and library are scripted."""

import contextlib
import json
import logging
import socket
import threading
from typing import Any

import pytest
from servers import ANSWER, PATIENCE, Client, Scripted, about, until

from hourllava.errors import (
    AdmissionError,
    BusyError,
    HourLlavaError,
    InputError,
    MemoryBusyError,
    MemoryFileError,
    ModelError,
    QuestionError,
    SourceConflictError,
    SourceError,
    SourceSizeError,
    StorageError,
    UnknownMemoryError,
    VideoError,
)
from hourllava.serve.problems import problem_of
from hourllava.serve.questions import Ended, Written

MOMENTS = [
    {"start": 2.0, "end": 4.0, "share": 0.75, "label": "00:02-00:03"},
    {"start": 7.0, "end": 8.0, "share": 0.25, "label": "00:07"},
]
POST_CHAT = "/v1/chat/completions"
POST = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


def test_an_answer_about_a_video(client: Client, scene: Scripted) -> None:
    reply = client.chat(about("When?", uuid="film"), budget="1/4", seed=3, temperature=0.5, max_tokens=9, model="small")
    body = reply.json()
    message = {"role": "assistant", "content": "It was red.", "refusal": None, "memory": "film"}
    assert reply.status == 200
    assert body["object"] == "chat.completion"
    assert body["model"] == "small"
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {"index": 0, "message": message | {"moments": MOMENTS}, "logprobs": None, "finish_reason": "stop"}
    ]
    assert body["usage"] == USAGE
    ((memory, question, options),) = scene.prepared
    assert (memory, question, options.budget) == ("film", "When?", "1/4")
    ((_, sampling),) = scene.engine.asked
    assert (sampling.seed, sampling.temperature, sampling.max_new_tokens) == (3, 0.5, 9)


def test_evidence_is_the_curve_of_attention(client: Client, scene: Scripted) -> None:
    message = client.chat(about("When?", uuid="film"), evidence=True).json()["choices"][0]["message"]
    assert message["curve"] == {"seconds": 60, "bins": [0.0, 0.0, 0.5, 0.25, 0.0, 0.0, 0.0, 0.25] + [0.0] * 52}
    assert "curve" not in client.chat(about("When?", uuid="film")).json()["choices"][0]["message"]


def test_a_stream_of_chunks(client: Client) -> None:
    reply = client.chat(about("When?", uuid="film"), stream=True, stream_options={"include_usage": True})
    assert (reply.status, reply.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    *chunks, last = reply.chunks()
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": "", "memory": "film", "moments": MOMENTS}
    assert deltas[1:] == [{"content": "It was "}, {"content": "red."}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]) == ([], USAGE)
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    assert all("usage" not in chunk for chunk in client.chat(stream=True).chunks())


def test_text_comes_as_it_is_written(client: Client, scene: Scripted) -> None:
    more = threading.Event()
    scene.engine.script = (Written("One"), more, Written(", two."), Ended("length", 2))
    connection, response = client.open(
        "POST", "/v1/chat/completions", {"messages": about("?", uuid="film"), "stream": True}
    )
    with contextlib.closing(connection):
        text = b""
        while b"One" not in text:
            text += response.read1()
        assert b"two" not in text
        more.set()
        text += response.read()
    assert b'"content": ", two."' in text
    assert b'"finish_reason": "length"' in text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_cancels_its_answer(stream: bool, client: Client, scene: Scripted) -> None:
    scene.engine.script = (Written("One"), threading.Event(), *ANSWER)
    body = json.dumps({"messages": about("?", uuid="film"), "stream": stream}).encode()
    head = f"{POST}content-length: {len(body)}\r\n\r\n"
    with socket.create_connection(client.address, PATIENCE) as connection:
        connection.sendall(head.encode() + body)
        until(lambda: scene.engine.asked)
        assert not scene.engine.tickets[0].cancelled
    until(lambda: scene.engine.tickets[0].cancelled)
    assert client.ask("GET", "/health").status == 200
    metrics = scene.service.metrics
    until(lambda: metrics.completion_tokens._value.get() == 1)  # which was written for nobody
    assert metrics.prompt_tokens._value.get() == 7


def test_a_video_is_waited_for(client: Client, scene: Scripted) -> None:
    """And the stream says how far it is."""
    scene.library.add("long", "watching", 30, 120)
    body = {"messages": about("?", uuid="long"), "stream": True}
    connection, response = client.open("POST", POST_CHAT, body)
    with contextlib.closing(connection):
        text = b""
        while b": watching 30 of 120 s\n\n" not in text:
            text += response.read1()
        assert not scene.prepared
        scene.library.add("long", "ready", 120, 120)
        text += response.read()
    assert b"It was " in text
    assert text.endswith(b"data: [DONE]\n\n")
    assert scene.prepared[0][0] == "long"


def test_a_whole_answer_waits_too_unless_told_not_to(client: Client, scene: Scripted) -> None:
    scene.library.add("long", "watching", 30, 120)
    assert client.chat(about("?", uuid="long"), wait=False).status == 200
    replies: list[int] = []
    asking = threading.Thread(target=lambda: replies.append(client.chat(about("?", uuid="long")).status))
    asking.start()
    looks = scene.library.looks
    until(lambda: scene.library.looks > looks + 3)
    assert len(scene.prepared) == 1
    scene.library.add("long", "ready", 120, 120)
    asking.join(PATIENCE)
    assert replies == [200]


def test_what_has_no_end_is_waited_for_until_it_begins(client: Client, scene: Scripted) -> None:
    scene.library.add("door", "following", 0)
    connection, response = client.open("POST", POST_CHAT, {"messages": about("?", uuid="door"), "stream": True})
    with contextlib.closing(connection):
        text = b""
        while b": following 0 s\n\n" not in text:
            text += response.read1()
        scene.library.add("door", "following", 1)
        text += response.read()
    assert b"It was " in text
    assert client.chat(about("?", uuid="door")).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_while_its_video_is_watched(stream: bool, client: Client, scene: Scripted) -> None:
    scene.library.add("long", "watching", 30, 120)
    body = json.dumps({"messages": about("?", uuid="long"), "stream": stream}).encode()
    with socket.create_connection(client.address, PATIENCE) as connection:
        connection.sendall(f"{POST}content-length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: scene.library.looks > 3)
    status = "200" if stream else "499"  # a stream has begun
    until(lambda: scene.service.metrics.requests.labels(POST_CHAT, status)._value.get() == 1)
    assert not scene.prepared


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_to_ask_yet(stream: bool, client: Client, scene: Scripted) -> None:
    scene.library.add("long", "watching", 0, 120)
    reply = client.chat(about("?", uuid="long"), wait=False, stream=stream)
    assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "not_ready", "1")


@pytest.mark.parametrize("stream", [False, True])
def test_a_video_that_could_not_be_watched(stream: bool, client: Client, scene: Scripted) -> None:
    scene.library.add("bad", "failed", 0)
    scene.library.errors["bad"] = VideoError("bad", "it is not a video", "give one")
    reply = client.chat(about("?", uuid="bad"), stream=stream)
    assert (reply.status, reply.error["message"]) == (400, "bad: it is not a video; give one")


def test_a_video_that_fails_while_a_stream_waits(client: Client, scene: Scripted) -> None:
    scene.library.add("bad", "waiting", 0)
    body = {"messages": about("?", uuid="bad"), "stream": True}
    connection, response = client.open("POST", POST_CHAT, body)
    with contextlib.closing(connection):
        assert response.status == 200
        scene.library.errors["bad"] = VideoError("bad", "it is not a video", "give one")
        scene.library.add("bad", "failed", 0)
        error, done = [line for line in response.read().decode().splitlines() if line.startswith("data: ")]
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == "bad: it is not a video; give one"
    assert done == "data: [DONE]"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (BusyError, 429, "busy"),
        (AdmissionError, 503, "no_room"),
        (UnknownMemoryError, 404, "not_found"),
        (MemoryBusyError, 409, "in_use"),
        (StorageError, 507, "no_space"),
        (MemoryFileError, 500, "memory_unreadable"),
        (ModelError, 500, "model_unusable"),
        (QuestionError, 400, None),
        (InputError, 400, None),
        (VideoError, 400, "video_unreadable"),
        (SourceConflictError, 409, "other_source"),
        (SourceSizeError, 413, "too_large"),
        (SourceError, 400, "source_unusable"),
        (HourLlavaError, 400, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_has_its_status(
    error: type[HourLlavaError], status: int, code: str | None, stream: bool, client: Client, scene: Scripted
) -> None:
    """Also of a stream, as long as it has not begun."""
    scene.library.errors["film"] = error("film", "so", "do that")
    reply = client.chat(about("?", uuid="film"), stream=stream)
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    assert reply.status == status
    assert reply.error == {"message": "film: so; do that", "type": kind, "param": None, "code": code}
    assert ("retry-after" in reply.headers) == (status in (429, 503))
    assert not scene.prepared


def test_every_error_of_ours_has_a_problem() -> None:
    def kinds(kind: type[HourLlavaError]) -> list[type[HourLlavaError]]:
        return [kind, *(k for each in kind.__subclasses__() for k in kinds(each))]

    assert all(problem_of(kind("it", "so", "do that")) is not None for kind in kinds(HourLlavaError))
    assert problem_of(RuntimeError("a bug")) is None


def test_a_budget_is_checked_before_anything_is_watched(client: Client, scene: Scripted) -> None:
    reply = client.chat(about("?", url="/films/new.mp4"), budget="half")
    assert (reply.status, scene.library.asked) == (400, [])


def test_room_that_comes_while_a_question_waits(
    client: Client, scene: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A memory that has no room now may have it when the question's turn comes."""
    scene.library.errors["film"] = AdmissionError("film", "no room", "ask again")

    def use(name: str) -> Any:
        error = scene.library.errors.pop(name, None)
        if error is not None:
            raise error
        return contextlib.nullcontext(name)

    monkeypatch.setattr(scene.library, "use", use)
    assert client.chat(about("?", uuid="film")).status == 200


@pytest.mark.parametrize("named", [{}, {"uuid": "film"}])
def test_a_text_that_no_decoder_reads(named: dict[str, str], client: Client, scene: Scripted) -> None:
    """It is refused before the engine's thread, which others wait for, counts its tokens."""
    messages = about("x" * 16 * 4096, **named) if named else "x" * 16 * 4096
    assert client.chat(messages).status == 200
    told = [{"role": "user", "content": "ä"}, {"role": "assistant", "content": "b"}]
    question = about("x" * 16 * 4096, **named) if named else [{"role": "user", "content": "x" * 16 * 4096}]
    reply = client.chat([*told, *question])
    why = f"it has {16 * 4096 + 3} bytes of text, and the decoder reads 4096 tokens"
    assert (reply.status, reply.error["message"]) == (400, f"question: {why}; shorten it")
    assert len(scene.prepared) == 1


def test_a_full_engine(client: Client, scene: Scripted) -> None:
    scene.engine.full = True
    reply = client.chat()
    assert (reply.status, reply.headers["retry-after"], reply.error["type"]) == (429, "1", "rate_limit_error")


@pytest.mark.parametrize("error", [InputError("it", "so", "do that"), RuntimeError("secret")])
def test_an_answer_that_breaks_off(error: Exception, client: Client, scene: Scripted, caplog: Any) -> None:
    scene.engine.script = (Written("One"), error)
    with caplog.at_level(logging.ERROR):
        *_, text, last = client.chat(about("?", uuid="film"), stream=True).chunks()
    assert text["choices"][0]["delta"] == {"content": "One"}
    told = last["error"]["message"]
    if isinstance(error, InputError):
        assert told == "it: so; do that"
    else:
        assert "secret" not in told
        assert text["id"] in told
        assert text["id"] in caplog.text


def test_a_bug_is_told_to_the_log_only(client: Client, scene: Scripted, caplog: Any) -> None:
    scene.engine.script = (Written("One"), RuntimeError("secret"))
    with caplog.at_level(logging.ERROR):
        reply = client.chat()
    assert reply.status == 500
    assert b"secret" not in reply.body
    assert (reply.error["type"], reply.error["code"]) == ("server_error", "internal")
    assert reply.headers["x-request-id"] in reply.error["message"]
    assert reply.headers["x-request-id"] in caplog.text
    assert "RuntimeError: secret" in caplog.text
    assert client.chat(about("?", uuid="film"), model=None, stream=None).status == 500


def test_the_model_s_name(client: Client) -> None:
    reply = client.chat(model="gpt-9")
    assert (reply.status, reply.error["param"], reply.error["code"]) == (404, "model", "model_not_found")
    (model,) = client.ask("GET", "/v1/models").json()["data"]
    assert model["id"] == "small"
    assert client.ask("GET", "/v1/models/small").json() == model
    assert client.ask("GET", "/v1/models/gpt-9").error["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("GET", "/nowhere", None, 404, None),
        ("GET", "/v1/chat/completions", None, 405, None),
        ("POST", "/v1/chat/completions", b"{", 400, None),
        ("POST", "/v1/chat/completions", b"", 400, None),
        ("POST", "/v1/chat/completions", {"messages": "hello"}, 400, "messages"),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "?"}], "\ud800": 1}, 400, None),
        ("POST", "/v1/chat/completions", [], 400, None),
        ("GET", "/v1/memories/film/picture", None, 400, "second"),
        ("GET", "/v1/memories/film/picture?second=-1", None, 400, "second"),
        ("GET", "/v1/memories/film/picture?second=1&width=5", None, 400, "width"),
        ("GET", "/v1/memories/film/picture?second=x", None, 400, "second"),
        ("POST", "/v1/memories", {"follow": True}, 400, "url"),
        ("POST", "/v1/memories", {"url": "rtsp://camera/1", "follow": True}, 400, "name"),
        ("POST", "/v1/memories", {"url": "a", "name": "../a"}, 400, "name"),
        ("PUT", "/v1/memories/.a", b"film", 400, "name"),
        ("PUT", "/v1/memories/a%00b", b"film", 400, "name"),
    ],
)
def test_bad_requests_in_openai_s_form(
    method: str, path: str, body: Any, status: int, param: str | None, client: Client
) -> None:
    reply = client.ask(method, path, body)
    assert (reply.status, reply.error["param"]) == (status, param)
    assert reply.headers["x-request-id"].startswith("req-")
    assert reply.headers["content-type"] == "application/json"


def test_a_body_that_is_not_marked_as_json(client: Client) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "?"}]}).encode()
    for kind in ("application/x-www-form-urlencoded", "text/plain"):
        reply = client.ask("POST", "/v1/chat/completions", body, {"content-type": kind})
        assert (reply.status, reply.error["code"]) == (400, "invalid_json")
        assert "content-type: application/json" in reply.error["message"]


def test_a_name_that_no_memory_can_have(client: Client) -> None:
    reply = client.chat(about("?", url="/a.mp4", uuid="../a"))
    assert (reply.status, reply.error["param"]) == (400, "uuid")
