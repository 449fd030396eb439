# SPDX-License-Identifier: Apache-2.0
"""The end of a server whose engine and library are scripted: everyone hears of it, and nobody holds it up."""

import contextlib
import json
import socket
import threading
import time

import pytest
from servers import ANSWER, PATIENCE, Client, Scripted, about, scripted, serving, until

from hourllava.serve.questions import Written


def test_it_ends_cleanly() -> None:
    """Who waits for a video is told at once; a running answer has a while, and then is told, too."""
    scene = scripted()
    scene.library.add("long", "watching", 5)
    with serving(scene.service) as address:
        body = {"messages": about("?", uuid="long"), "stream": True}
        connection, response = Client(address).open("POST", "/v1/chat/completions", body)
    with contextlib.closing(connection):
        lines = [line for line in response.read().decode().splitlines() if line]
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "stopping"
    assert lines[-1] == "data: [DONE]"
    assert scene.engine.closed
    assert scene.library.closed


def test_an_answer_that_does_not_end(scene: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hourllava.serve.running.GRACE", 0.2)
    scene.engine.script = (Written("One"), threading.Event(), *ANSWER)
    with serving(scene.service) as address:
        body = {"messages": about("?", uuid="film"), "stream": True}
        connection, response = Client(address).open("POST", "/v1/chat/completions", body)
        until(lambda: scene.engine.asked)
    with contextlib.closing(connection):
        lines = [line for line in response.read().decode().splitlines() if line]
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "stopping"
    assert lines[-1] == "data: [DONE]"


def problem_in(connection: socket.socket) -> tuple[int, str]:
    """Status and code of an error that is the last response of a connection."""
    text = b""
    while piece := connection.recv(10000):
        text += piece
    head, _, body = text.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def test_a_file_that_is_being_sent_does_not_hold_it_up() -> None:
    scene = scripted()
    with contextlib.ExitStack() as stack:
        with serving(scene.service) as address:
            connection = stack.enter_context(socket.create_connection(address, PATIENCE))
            connection.sendall(b"PUT /v1/memories/new HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\npart")
            until(lambda: scene.library.incoming)
            began = time.monotonic()
        assert time.monotonic() - began < 4
        assert problem_in(connection) == (503, "stopping")
    assert scene.library.aborted == ["new"]


def test_a_question_that_never_comes_whole(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It has as long as an answer, and is told then; the log holds no traceback."""
    monkeypatch.setattr("hourllava.serve.running.GRACE", 0.0)
    monkeypatch.setattr("hourllava.serve.running.FAREWELL", 1)
    scene = scripted()
    with contextlib.ExitStack() as stack:
        with serving(scene.service) as address:
            connection = stack.enter_context(socket.create_connection(address, PATIENCE))
            head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            connection.sendall(f"{head}content-length: 9\r\n\r\n{{".encode())
            Client(address).ask("GET", "/health")  # answered behind it
        assert problem_in(connection) == (503, "stopping")
    assert all(record.exc_info is None for record in caplog.records)
