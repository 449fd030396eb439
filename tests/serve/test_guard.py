# SPDX-License-Identifier: Apache-2.0
"""Who may ask, how much, and what operators see, of a server whose engine and library are scripted."""

import socket
from pathlib import Path

import pytest
from servers import PATIENCE, Client, Scripted, about, until

from hourllava.serve.guard import MAX_BODY

POST = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize("told", [True, False])
def test_a_body_that_is_too_long(told: bool, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not its length is told beforehand."""
    monkeypatch.setattr("hourllava.serve.guard.MAX_BODY", 1000)
    assert MAX_BODY > 1000
    head = "content-length: 3000" if told else "transfer-encoding: chunked"
    body = b"x" * 3000 if told else b"bb8\r\n" + b"x" * 3000 + b"\r\n0\r\n\r\n"
    request = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{head}\r\n\r\n"
    )
    with socket.create_connection(client.address, PATIENCE) as connection:
        connection.sendall(request.encode() + body)
        answer = connection.recv(10000)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert client.ask("PUT", "/v1/memories/new", b"x" * 3000).status == 202


@pytest.mark.parametrize("body", [b'{"messages": "\xe9"}', b"[" * 100_000, b"\x1f\x8b\x08"])
def test_a_body_that_cannot_be_read(body: bytes, client: Client) -> None:
    reply = client.ask("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    assert (reply.status, reply.error["code"]) == (400, "invalid_json")
    assert reply.error["message"] == "the body cannot be read; send JSON in UTF-8, not nested too deep"


def test_a_client_that_goes_before_its_body_is_whole(client: Client, scene: Scripted) -> None:
    """It is counted as one that has gone, and not as one that sent nonsense."""
    with socket.create_connection(client.address, PATIENCE) as connection:
        connection.sendall(f"{POST}content-length: 9\r\n\r\n{{".encode())
        until(lambda: client.ask("GET", "/health").status == 200)
    requests = scene.service.metrics.requests
    until(lambda: requests.labels("/v1/chat/completions", "499")._value.get() == 1)
    assert requests.labels("/v1/chat/completions", "400")._value.get() == 0


@pytest.fixture
def locked(client: Client, scene: Scripted) -> Client:
    scene.service.key, scene.service.local = "s3cret-key", False
    return client


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_key"),
        ({"authorization": "Bearer "}, "missing_key"),
        ({"authorization": "Basic s3cret-key"}, "missing_key"),
        ({"authorization": "Bearer s3cret-ke"}, "invalid_api_key"),
        ({"authorization": "Bearer s3cret-keyy"}, "invalid_api_key"),
        ({"authorization": "Bearer \xe9\xe9"}, "invalid_api_key"),
        ({"cookie": "hourllava_key=wrong"}, "invalid_api_key"),
        ({"cookie": "other=s3cret-key"}, "missing_key"),
        ({"authorization": "Bearer s3cret-key"}, None),
        ({"authorization": "bearer s3cret-key"}, None),
        ({"cookie": "a=b; hourllava_key=s3cret-key"}, None),
    ],
)
def test_the_key(headers: dict[str, str], code: str | None, locked: Client) -> None:
    for method, path in [("GET", "/v1/models"), ("GET", "/metrics"), ("DELETE", "/v1/memories/film")]:
        reply = locked.ask(method, path, headers=headers)
        if code is None:
            assert reply.status == 200
        else:
            assert (reply.status, reply.error["code"], reply.headers["www-authenticate"]) == (401, code, "Bearer")


def test_what_needs_no_key(locked: Client, scene: Scripted) -> None:
    for path in ("/health", "/", "/page.css", "/page.js"):
        assert locked.ask("GET", path).status == 200
    for path in ("//v1/models", "/V1/models", "/v1/../v1/models", "/v1%2fmodels"):
        assert locked.ask("GET", path).status in (401, 404)
    assert locked.ask("GET", "/v1/models", headers={"host": "anything"}).status == 401


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("localhost:8000", True),
        ("127.0.0.1:8000", True),
        ("127.1.2.3", True),
        ("[::1]:8000", True),
        ("a.localhost", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("192.168.0.1", False),
        ("0.0.0.0", False),
        ("[", False),
        ("", False),
    ],
)
def test_names_of_this_machine_only(host: str, allowed: bool, client: Client) -> None:
    reply = client.ask("GET", "/v1/memories", headers={"host": host})
    assert reply.status == (200 if allowed else 403)
    if not allowed:
        assert reply.error["code"] == "wrong_host"


def test_a_key_is_enough_whatever_the_host(client: Client, scene: Scripted) -> None:
    scene.service.key = "s3cret-key"
    headers = {"host": "server.example", "authorization": "Bearer s3cret-key"}
    assert client.ask("GET", "/v1/models", headers=headers).status == 200


def test_pages_of_others_may_not_ask(client: Client, scene: Scripted) -> None:
    for origin in ("https://evil.example", "null", "http://localhost:1", "http://localhost.evil.example"):
        reply = client.ask("POST", "/v1/memories/film/stop", headers={"origin": origin, "host": "localhost"})
        assert (reply.status, reply.error["code"]) == (403, "wrong_origin")
    assert scene.library.status("film").state == "ready"  # nor does it happen
    ours = {"origin": "http://localhost:8000", "host": "localhost:8000"}
    reply = client.ask("POST", "/v1/memories/film/stop", headers=ours)
    assert reply.status == 200
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_the_page(client: Client) -> None:
    for path, kind in [("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")]:
        reply = client.ask("GET", path)
        assert (reply.status, reply.headers["content-type"]) == (200, f"{kind}; charset=utf-8")
        assert reply.headers["content-security-policy"].startswith("default-src 'self'; img-src 'self' blob: data:;")
        assert reply.headers["x-content-type-options"] == "nosniff"


def test_what_monitors_and_players_ask_first(client: Client, scene: Scripted, tmp_path: Path) -> None:
    """HEAD gives the headers of GET, and no body."""
    scene.library.film_path = tmp_path / "film.mp4"
    scene.library.film_path.write_bytes(b"film")
    for path in ("/health", "/", "/page.js", "/v1/memories/film/video"):
        head, whole = (client.ask(method, path) for method in ("HEAD", "GET"))
        assert (head.status, head.body) == (200, b"")
        assert all(head.headers[name] == whole.headers[name] for name in ("content-type", "content-length"))


def test_metrics(client: Client, scene: Scripted) -> None:
    client.chat(about("?", uuid="film"))
    client.chat(model="gpt-9")
    client.ask("GET", "/nowhere/1")
    scene.library.add("long", "watching", 30)
    text = client.ask("GET", "/metrics").body.decode().splitlines()
    for line in [
        'hourllava_requests_total{route="/v1/chat/completions",status="200"} 1.0',
        'hourllava_requests_total{route="/v1/chat/completions",status="404"} 1.0',
        'hourllava_requests_total{route="none",status="404"} 1.0',
        "hourllava_first_text_seconds_count 1.0",
        "hourllava_answer_seconds_count 1.0",
        "hourllava_prompt_tokens_total 7.0",
        "hourllava_completion_tokens_total 3.0",
        "hourllava_questions_waiting 2.0",
        "hourllava_answers_running 3.0",
        'hourllava_videos{state="ready"} 1.0',
        'hourllava_videos{state="watching"} 1.0',
        "hourllava_video_seconds 90.0",
        'hourllava_pool_used_bytes{tier="cpu"} 400.0',
        'hourllava_pool_budget_bytes{tier="cpu"} 1000.0',
    ]:
        assert line in text
