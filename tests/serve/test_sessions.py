# SPDX-License-Identifier: Apache-2.0
"""The websocket: frames and questions of one client, of a server whose engine and library are scripted."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from typing import Any

import pytest
from PIL import Image
from servers import ANSWER, PATIENCE, Client, Scripted, serving, until
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from hourllava.serve.questions import Ended, Written

PATH = "/v1/video/chat/stream"


class Session:
    """One connection, whose events are dicts."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    def send(self, kind: str, **fields: Any) -> None:
        self.connection.send(json.dumps({"type": kind, **fields}))

    def next(self, kind: str) -> dict[str, Any]:
        """The next event, which is of this kind."""
        event = json.loads(self.connection.recv(PATIENCE))
        assert event.pop("type") == kind, event
        return event

    def ask(self, text: str = "When?") -> dict[str, Any]:
        """A question and all of its answer."""
        self.send("video.query", text=text)
        assert self.next("response.start") == {}
        assert [self.next("response.text.delta")["delta"] for _ in range(2)] == ["It was ", "red."]
        return self.next("response.text.done")


@contextmanager
def opened(client: Client, **headers: str) -> Iterator[Session]:
    host, port = client.address
    with connect(f"ws://{host}:{port}{PATH}", additional_headers=headers) as connection:
        yield Session(connection)


def picture(width: int = 4, height: int = 3, kind: str = "PNG") -> str:
    data = BytesIO()
    Image.new("RGB", (width, height), "red").save(data, kind)
    return base64.b64encode(data.getvalue()).decode()


def test_frames_and_questions(client: Client, scene: Scripted) -> None:
    with opened(client) as session:
        session.send("session.config", budget="1/4", temperature=0.5, seed=3, max_tokens=9, model="small")
        name = session.next("session.created")["memory"]
        assert name.startswith("session-")
        for number, kind in enumerate(("PNG", "JPEG"), 1):
            session.send("video.frame", data=picture(kind=kind))
            assert session.next("video.appended") == {"frames": number}
        done = session.ask()
        assert done["text"] == "It was red."
        assert [moment["label"] for moment in done["moments"]] == ["00:02-00:03", "00:07"]
        session.send("video.done")
        with pytest.raises(ConnectionClosedOK):
            session.connection.recv(PATIENCE)
    ((memory, question, options),) = scene.prepared
    assert (memory, question, options.budget) == (name, "When?", "1/4")
    ((_, sampling),) = scene.engine.asked
    assert (sampling.temperature, sampling.seed, sampling.max_new_tokens) == (0.5, 3, 9)
    frame = scene.library.appended[0]
    assert (tuple(frame.shape), frame[0, :, 0, 0].tolist()) == ((1, 3, 3, 4), [255, 0, 0])
    assert scene.library.closed_live == [name]


def test_a_question_goes_on_with_what_has_been_said(client: Client, scene: Scripted) -> None:
    with opened(client) as session:
        session.send("session.config", memory="film")
        session.next("session.created")
        said = session.ask("When?")["text"]
        session.send("video.query", text="Where?", history=[["When?", said], ["Why?", ""]])
        session.next("response.start")
    until(lambda: len(scene.prepared) == 2)
    (_, first, options), (_, second, later) = scene.prepared
    assert (first, options.history) == ("When?", ())
    assert (second, later.history) == ("Where?", (("When?", "It was red."), ("Why?", "")))


def test_a_video_that_is_held_is_asked(client: Client, scene: Scripted) -> None:
    """Without taking it over; frames go on with it."""
    with opened(client) as session:
        session.send("session.config", memory="film")
        assert session.next("session.created") == {"memory": "film"}
        session.ask()
        session.ask("Where?")
        assert scene.library.closed_live == []
        assert scene.library.status("film").state == "ready"
        session.send("video.frame", data=picture())
        session.next("video.appended")
    until(lambda: scene.library.closed_live == ["film"])
    assert [asked[1] for asked in scene.prepared] == ["When?", "Where?"]


def test_a_new_name(client: Client, scene: Scripted) -> None:
    with opened(client) as session:
        session.send("session.config", memory="door")
        assert session.next("session.created") == {"memory": "door"}
        assert scene.library.status("door").state == "following"
        session.send("video.query", text="When?")
        assert "no second of it has been watched yet" in session.next("error")["message"]


def test_frames_come_while_an_answer_is_written(client: Client, scene: Scripted) -> None:
    more = threading.Event()
    scene.engine.script = (Written("It was "), more, Written("red."), Ended("stop", 2))
    with opened(client) as session:
        session.send("session.config", memory="film")
        session.next("session.created")
        session.send("video.query", text="When?")
        session.next("response.start")
        assert session.next("response.text.delta") == {"delta": "It was "}
        session.send("video.frame", data=picture())
        assert session.next("video.appended") == {"frames": 1}
        session.send("video.query", text="Where?")
        session.send("video.done")
        until(lambda: scene.library.closed_live)  # while questions are still to be answered
        session.send("video.frame", data=picture())
        assert "the session is done" in session.next("error")["message"]
        more.set()
        assert session.next("response.text.delta") == {"delta": "red."}
        assert session.next("response.text.done")["text"] == "It was red."
        session.next("response.start")  # questions that wait are answered before the end
        assert [session.next("response.text.delta")["delta"] for _ in range(2)] == ["It was ", "red."]
        session.next("response.text.done")
        with pytest.raises(ConnectionClosedOK):
            session.connection.recv(PATIENCE)


def test_who_goes_cancels_the_answer(client: Client, scene: Scripted) -> None:
    scene.engine.script = (Written("It was "), threading.Event(), *ANSWER)
    with opened(client) as session:
        session.send("session.config")
        session.next("session.created")
        session.send("video.frame", data=picture())
        session.next("video.appended")
        session.send("video.query", text="When?")
        session.next("response.start")
        assert not scene.engine.tickets[0].cancelled
    until(lambda: scene.engine.tickets[0].cancelled)
    until(lambda: scene.library.closed_live)


def test_the_server_ends_it(scene: Scripted) -> None:
    with ExitStack() as stack:
        with serving(scene.service) as address:
            session = stack.enter_context(opened(Client(address)))
            session.send("session.config")
            session.next("session.created")
        with pytest.raises(ConnectionClosed):
            session.connection.recv(PATIENCE)
    assert len(scene.library.closed_live) == 1


EVENTS: list[tuple[Any, str]] = [
    ("{", "not JSON"),
    ("[]", "an object"),
    ({}, "type"),
    ({"type": "video.rewind"}, "video.rewind"),
    ({"type": "video.frame"}, "data is missing"),
    ({"type": "video.frame", "data": "!"}, "not base64"),
    ({"type": "video.frame", "data": "AAAA"}, "no picture that can be read"),
    ({"type": "video.frame", "data": "", "second": 5}, "second"),
    ({"type": "video.query", "text": 5}, "text"),
    ({"type": "video.query", "text": "\ud800"}, "not JSON"),
    ({"type": "video.query", "text": "?", "history": "When?"}, "history"),
    ({"type": "video.query", "text": "?", "history": [["When?"]]}, "history[0][1] is missing"),
    ({"type": "video.query", "text": "?", "history": [["", "red"]]}, "history[0][0]"),
    ({"type": "session.config"}, "has its config"),
]


@pytest.mark.parametrize(("event", "why"), EVENTS)
def test_a_bad_event_ends_nothing(event: Any, why: str, client: Client) -> None:
    with opened(client) as session:
        session.send("session.config", memory="film")
        session.next("session.created")
        session.connection.send(event if isinstance(event, str) else json.dumps(event))
        assert why in session.next("error")["message"]
        session.ask()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"memory": "../a"}, "no name for a folder"),
        ({"memory": ""}, "memory"),
        ({"model": "gpt-9"}, "not served here"),
        ({"budget": "half"}, "no budget"),
        ({"temperature": 5}, "temperature"),
        ({"num_frames": 4}, "num_frames"),
    ],
)
def test_a_bad_config(fields: dict[str, Any], why: str, client: Client, scene: Scripted) -> None:
    with opened(client) as session:
        for event in ({"type": "video.query", "text": "?"}, {"type": "video.frame", "data": picture()}):
            session.connection.send(json.dumps(event))
            assert "send session.config first" in session.next("error")["message"]
        session.send("session.config", **fields)
        assert why in session.next("error")["message"]
        assert list(scene.library.held) == ["film"]
        session.send("session.config", memory="film")
        session.next("session.created")


def test_a_question_that_fails(client: Client, scene: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    scene.engine.script = (Written("One"), RuntimeError("secret"))
    with opened(client) as session:
        session.send("session.config", memory="film")
        session.next("session.created")
        session.send("video.query", text="When?")
        session.next("response.start")
        session.next("response.text.delta")
        assert "secret" not in session.next("error")["message"]
        assert "RuntimeError: secret" in caplog.text
        scene.engine.script = ANSWER
        session.ask()


def test_too_many_questions_at_a_time(client: Client, scene: Scripted) -> None:
    more = threading.Event()
    scene.engine.script = (more, *ANSWER)
    with opened(client) as session:
        session.send("session.config", memory="film")
        session.next("session.created")
        session.send("video.query", text="When?")
        session.next("response.start")
        for _ in range(9):
            session.send("video.query", text="When?")
        assert "8 questions of this session are waiting" in session.next("error")["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong-key"}, 401),
        ({"Authorization": "Bearer s3cret-key", "Origin": "https://evil.example"}, 403),
    ],
)
def test_who_may_not_connect(headers: dict[str, str], status: int, client: Client, scene: Scripted) -> None:
    scene.service.key = "s3cret-key"
    with pytest.raises(InvalidStatus) as refused, opened(client, **headers):
        pass
    assert refused.value.response.status_code == status
    assert json.loads(refused.value.response.body)["error"]["type"] == "invalid_request_error"


def test_who_may_connect(client: Client, scene: Scripted) -> None:
    scene.service.key = "s3cret-key"
    with opened(client, Cookie="hourllava_key=s3cret-key") as session:
        session.send("session.config", memory="film")
        session.next("session.created")
