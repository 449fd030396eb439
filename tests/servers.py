# SPDX-License-Identifier: Apache-2.0
"""A server in a thread, as clients meet it; its engine writes what a test says, its library holds what a test says."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from hourllava.errors import BusyError, SourceConflictError, UnknownMemoryError
from hourllava.memory import TierUsage
from hourllava.model import Prepared
from hourllava.serve.answering import Service
from hourllava.serve.jobs import Status
from hourllava.serve.metrics import Metrics
from hourllava.serve.questions import Began, Ended, Event, Failed, Ticket, Written
from hourllava.serve.running import Server
from hourllava.serve.sources import SourcePolicy

PATIENCE = 20.0  # seconds that a test waits for what should come at once
ANSWER = (Written("It was "), Written("red."), Ended("stop", 3))


class ScriptedEngine:
    """Writes the same answer to everyone; a `threading.Event` in it is waited for, and an error is raised."""

    def __init__(self) -> None:
        self.script: tuple[Any, ...] = ANSWER
        self.asked: list[tuple[Prepared, Any]] = []
        self.tickets: list[Ticket] = []
        self.full = self.closed = False
        self._threads: list[threading.Thread] = []

    def submit(self, prepare: Callable[[], Prepared], sampling: Any, on_event: Callable[[Event], None]) -> Ticket:
        if self.full:
            raise BusyError("server", "9 questions are waiting", "ask again in a moment")
        ticket = Ticket(prepare, sampling, on_event)
        self.tickets.append(ticket)
        self._threads.append(threading.Thread(target=self._write, args=(ticket,), daemon=True))
        self._threads[-1].start()
        return ticket

    def _write(self, ticket: Ticket) -> None:
        try:
            prepared = ticket.prepare()
        except Exception as error:
            ticket.on_event(Failed(error))
            return
        self.asked.append((prepared, ticket.sampling))
        ticket.on_event(Began(prepared.embeds.shape[1], prepared.mass))
        for step in self.script:
            if isinstance(step, threading.Event):
                while not (step.wait(0.01) or ticket.cancelled or self.closed):
                    pass
                if ticket.cancelled or self.closed:
                    ticket.on_event(Ended("cancelled", 1))
                    return
            else:
                ticket.on_event(Failed(step) if isinstance(step, Exception) else step)

    def counts(self) -> tuple[int, int]:
        return 2, 3

    def close(self) -> None:
        self.closed = True
        for thread in self._threads:
            thread.join()


@dataclass
class _Incoming:
    """An upload, or the memory that a client sends frames to."""

    library: "ScriptedLibrary"
    name: str
    pieces: list[bytes] = field(default_factory=list)
    frames: int = 0

    def write(self, data: bytes) -> None:
        self.pieces.append(data)
        if self.library.full is not None:
            raise self.library.full

    def commit(self) -> None:
        self.library.uploads[self.name] = self.pieces
        self.library.add(self.name, "waiting", 0)

    def abort(self) -> None:
        self.library.aborted.append(self.name)

    def append(self, frames: torch.Tensor) -> int:
        self.frames += len(frames)
        self.library.add(self.name, "following", self.frames)
        self.library.appended.append(frames)
        return self.frames

    def close(self) -> None:
        self.library.closed_live.append(self.name)


class ScriptedLibrary:
    """Videos that are as far as a test says."""

    def __init__(self) -> None:
        self.held: dict[str, Status] = {}
        self.errors: dict[str, Exception] = {}
        self.asked: list[tuple[Any, ...]] = []
        self.incoming: list[str] = []
        self.uploads: dict[str, list[bytes]] = {}
        self.full: Exception | None = None  # of an upload
        self.aborted: list[str] = []
        self.appended: list[torch.Tensor] = []
        self.closed_live: list[str] = []
        self.film_path: Path | None = None
        self.closed = False
        self.looks = 0  # how often someone has asked how far a video is

    def add(self, name: str, state: Any = "ready", frames: int = 60, expected: int | None = None) -> None:
        self.held[name] = Status(name, f"/films/{name}.mp4", state, frames, expected, None, None, 1.5)

    def ensure(self, source: str | None, name: str | None) -> str:
        self.asked.append((source, name))
        if source is None and name not in self.held:
            raise UnknownMemoryError(name, "there is no such video", "name one")
        if name in self.held and source not in (None, self.held[name].source):
            raise SourceConflictError(name, "it stands for another video", "choose another name")
        found = name or Path(str(source)).stem
        if found not in self.held:
            self.add(found, "waiting", 0)
        return found

    def status(self, name: str) -> Status:
        self.looks += 1
        if name not in self.held:
            raise UnknownMemoryError(name, "there is no such video", "name one")
        return self.held[name]

    def statuses(self) -> list[Status]:
        return list(self.held.values())

    def wait(self, name: str, timeout: float | None = None) -> bool:
        if name in self.errors:
            raise self.errors[name]
        return True

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[str]:
        if name in self.errors:
            raise self.errors[name]
        yield name

    def follow(self, url: str, name: str, idle: float) -> str:
        self.asked.append((url, name, idle))
        self.add(name, "following", 0)
        return name

    def live(self, name: str) -> _Incoming:
        self.add(name, "following", 0)
        return _Incoming(self, name)

    def upload(self, name: str) -> _Incoming:
        self.incoming.append(name)
        return _Incoming(self, name)

    def film(self, name: str) -> Path | None:
        self.status(name)
        return self.film_path

    def stop(self, name: str) -> None:
        self.add(name, "stopped", self.status(name).frames)

    def delete(self, name: str) -> None:
        self.status(name)
        del self.held[name]

    def usage(self) -> list[TierUsage]:
        return [TierUsage("cpu", 1000, 400, 100, ("film",))]

    def close(self) -> None:
        self.closed = True


@contextlib.contextmanager
def serving(service: Service) -> Iterator[tuple[str, int]]:
    """The address of a server while it runs; it is stopped as a signal would stop it."""
    ready = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()
        server = Server(service, ready.set)
        thread = threading.Thread(target=server.run, args=([taken],), daemon=True)
        thread.start()
        assert ready.wait(PATIENCE)
        try:
            yield address
        finally:
            server.should_exit = True
            thread.join(PATIENCE + 10)
            assert not thread.is_alive()


@dataclass
class Scripted:
    """A service, what it is made of, and what the model was asked to prepare."""

    service: Service
    engine: ScriptedEngine
    library: ScriptedLibrary
    prepared: list[Any] = field(default_factory=list)


def scripted() -> Scripted:
    """A service whose engine and library do as they are told; nothing of it is a model."""
    engine, library = ScriptedEngine(), ScriptedLibrary()
    metrics = Metrics(engine, library)  # type: ignore[arg-type]
    text = SimpleNamespace(max_position_embeddings=4096)
    model: Any = SimpleNamespace(config=SimpleNamespace(text_config=text))
    service = Service(model, "small", engine, library, metrics, SourcePolicy())  # type: ignore[arg-type]
    return Scripted(service, engine, library)


@dataclass
class Reply:
    """A response that has been read."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error in it, which has OpenAI's form."""
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]
        return error

    def chunks(self) -> list[Any]:
        """What a stream of events holds, without its end."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


@dataclass
class Client:
    """Asks a server, one connection each time."""

    address: tuple[str, int]

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        """A whole exchange; what is neither bytes nor None is sent as JSON."""
        connection, response = self.open(method, path, body, headers)
        with contextlib.closing(connection):
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def open(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[HTTPConnection, HTTPResponse]:
        """The same, but the body of the response is still to come."""
        headers = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"content-type": "application/json", **headers}
        connection = HTTPConnection(*self.address, timeout=PATIENCE)
        connection.request(method, path, body, headers)
        return connection, connection.getresponse()

    def chat(self, messages: Any = "What was red?", headers: dict[str, str] | None = None, **fields: Any) -> Reply:
        """Ask for a chat completion; a text is the only message."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.ask("POST", "/v1/chat/completions", {"messages": messages, **fields}, headers)


def about(text: str, url: str | None = None, uuid: str | None = None) -> list[dict[str, Any]]:
    """A question about a video, as a list of messages."""
    named = {"video_url": None if url is None else {"url": url}} | ({} if uuid is None else {"uuid": uuid})
    return [{"role": "user", "content": [{"type": "video_url", **named}, {"type": "text", "text": text}]}]


def until(condition: Callable[[], Any], patience: float = PATIENCE) -> None:
    """Wait for something to come true.

    Raises:
        AssertionError: it does not in time.
    """
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
