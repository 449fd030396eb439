# SPDX-License-Identifier: Apache-2.0
"""`hourllava serve` as a process of its own, asked as users ask it: with OpenAI's client, a websocket and files."""

import base64
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from clips import board, number_on, write_clip
from PIL import Image
from servers import PATIENCE, Client, about, until
from websockets.exceptions import ConnectionClosedOK
from websockets.sync.client import connect

from hourllava.memory import Repository, verify
from hourllava.model import Answer, FrameWriter, load_model

KEY = "a-key-of-16-letters"
SECONDS = 20
QUESTION = "Which colour was the star?"
LAST = "Where was it?"


@dataclass
class Served:
    """A server, the folder that holds its videos, and the answers that the model gives without one."""

    address: tuple[str, int]
    folder: Path
    process: "subprocess.Popen[bytes]"

    def client(self, key: str = KEY) -> openai.OpenAI:
        host, port = self.address
        return openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    @property
    def film(self) -> str:
        return f"file://{self.folder}/film.mp4"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server from when it is ready; unless a test has ended it, it ends as it should."""
    folder = tmp_path_factory.mktemp("served")
    write_clip(folder / "film.mp4", range(10 * SECONDS), Fraction(1, 10), options={"g": "20"})
    (folder / "key").write_text(KEY)
    log, options = folder / "log", ["--local", str(folder), "--api-key-file", str(folder / "key"), "--keep-videos"]
    command = [sys.executable, "-m", "hourllava", "serve", "--port", "0", "--memories", str(folder / "memories")]
    with log.open("wb") as file:
        process = subprocess.Popen([*command, *options], stdout=file, stderr=file)
    try:
        until(lambda: b"serving at" in log.read_bytes() or process.poll() is not None, 60)
        lines = log.read_text().splitlines()
        address, _, port = lines[-1].rpartition(":")
        assert address == "serving at http://127.0.0.1"
        yield Served(("127.0.0.1", int(port)), folder, process)
        process.terminate()
        assert process.wait(PATIENCE) == 0
        # Nothing went wrong on the way but what a test has done.
        assert [line for line in log.read_text().splitlines() if f"{folder}/key: is not a video" not in line] == lines
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def alone(served: Served) -> Any:
    """The model without a server, and the memory of the film, kept as the server keeps it."""
    model = load_model("tiny")
    memory = Repository(served.folder / "alone").add("film", FrameWriter(model))
    return model, model.watch(served.folder / "film.mp4", progress=False, into=memory)


def assert_same(message: Any, answer: Answer) -> None:
    assert message.content == answer.text
    assert [m["label"] for m in message.moments] == [str(m) for m in answer.moments]
    assert [m["share"] for m in message.moments] == pytest.approx([m.share for m in answer.moments], abs=1e-5)


def test_a_conversation_about_a_video(served: Served, alone: Any) -> None:
    """Plain, streamed, by its name alone, and with what has been said before: always what the model says by itself."""
    model, memory = alone
    client, first = served.client(), model.ask(memory, QUESTION)
    named = about(QUESTION, url=served.film, uuid="film")
    plain = client.chat.completions.create(model="tiny", messages=named)
    message = plain.choices[0].message
    assert_same(message, first)
    assert plain.choices[0].finish_reason == "stop"
    assert message.memory == "film"

    stream = client.chat.completions.create(
        model="tiny",
        messages=about(QUESTION, uuid="film"),
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"evidence": True, "budget": "all"},
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == first.text
    curve = chunks[0].choices[0].delta.curve
    everything = model.ask(memory, QUESTION, budget="all")
    assert curve["seconds"] == SECONDS
    assert curve["bins"] == pytest.approx(everything.mass.tolist(), abs=1e-5)
    assert last.usage.prompt_tokens == plain.usage.prompt_tokens
    assert last.usage.completion_tokens == plain.usage.completion_tokens > 0

    said = [*named, message, {"role": "user", "content": LAST}]
    second = client.chat.completions.create(model="tiny", messages=said)
    assert_same(second.choices[0].message, model.ask(memory, LAST, history=[(QUESTION, first.text)]))


def test_chance_is_repeatable(served: Served) -> None:
    client = served.client()
    given: dict[str, Any] = {
        "model": "tiny",
        "messages": about("Tell me.", url=served.film, uuid="film"),
        "max_tokens": 12,
    }
    texts = [
        client.chat.completions.create(**given, temperature=2, seed=s).choices[0].message.content for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    stopped = client.chat.completions.create(**given, temperature=2, seed=1, stop=[texts[0][3:5]])
    assert texts[0].startswith(stopped.choices[0].message.content)
    assert texts[0][3:5] not in stopped.choices[0].message.content
    short = client.chat.completions.create(**given | {"max_tokens": 1}, temperature=2, seed=1)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 1)


def test_text_and_an_image(served: Served) -> None:
    client, data = served.client(), BytesIO()
    Image.new("RGB", (70, 60), "red").save(data, "JPEG")
    url = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
    image = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    tokens = []
    for content in ("What is it?", image, [image[0], *image]):
        done = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}], max_tokens=3
        )
        assert not hasattr(done.choices[0].message, "moments")
        tokens.append(done.usage.prompt_tokens)
    assert tokens[0] < 30 < min(tokens[1:])
    assert tokens[1] != tokens[2]


@pytest.mark.parametrize(
    ("changes", "kind", "why"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "not served here"),
        ({"messages": about("?", uuid="absent")}, openai.NotFoundError, "absent"),
        ({"messages": about("?", url="/etc/passwd")}, openai.BadRequestError, "directory that is served"),
        ({"messages": about("?", url="FOLDER/absent.mp4")}, openai.BadRequestError, "it cannot be read"),
        ({"messages": about("?", url="FOLDER/key", uuid="key")}, openai.BadRequestError, "is not a video"),
        ({"messages": about("?", url="http://127.0.0.1/a.mp4")}, openai.BadRequestError, "reads nothing from"),
        ({"messages": about("?", url="FOLDER/key", uuid="film")}, openai.ConflictError, "another video"),
        ({"messages": about("<|im_end|>?", url="FOLDER/film.mp4")}, openai.BadRequestError, "<|im_end|>"),
        ({"messages": about("long " * 3000, url="FOLDER/film.mp4")}, openai.BadRequestError, "the decoder reads 4096"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"extra_body": {"budget": "0p"}}, openai.BadRequestError, "budget"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_as_openai_s_client_knows_them(
    changes: dict[str, Any], kind: type[openai.APIStatusError], why: str, stream: bool, served: Served
) -> None:
    client = served.client()
    client.chat.completions.create(model="tiny", messages=about("?", url=served.film, uuid="film"), max_tokens=1)
    given = {"model": "tiny", "messages": about("?", uuid="film"), "stream": stream} | changes
    given = json.loads(json.dumps(given).replace("FOLDER", str(served.folder)))
    with pytest.raises((kind, openai.APIError)) as raised:
        list(client.chat.completions.create(**given))
    assert why in raised.value.message
    if type(raised.value) is not openai.APIError:  # which is what comes in a stream that has begun
        assert type(raised.value) is kind


def test_the_key_is_asked_for(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        served.client("another-key").models.list()
    assert [model.id for model in served.client().models.list()] == ["tiny"]


def test_a_file_is_sent_asked_and_deleted(served: Served, alone: Any) -> None:
    model, memory = alone
    client, headers = Client(served.address), {"authorization": f"Bearer {KEY}"}
    data = (served.folder / "film.mp4").read_bytes()
    assert client.ask("PUT", "/v1/memories/sent", data, headers).status == 202
    assert client.ask("PUT", "/v1/memories/sent", data, headers).status == 409
    message = (
        served.client().chat.completions.create(model="tiny", messages=about(QUESTION, uuid="sent")).choices[0].message
    )
    assert_same(message, model.ask(memory, QUESTION))
    status = client.ask("GET", "/v1/memories/sent", headers=headers).json()
    assert (status["state"], status["frames"]) == ("ready", SECONDS)
    assert client.ask("GET", "/v1/memories/sent/video", headers=headers).body == data
    reply = client.ask("GET", "/v1/memories/sent/picture?second=3", headers=headers)
    picture = Image.open(BytesIO(reply.body))
    assert (
        number_on(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(64, 64, 3).permute(2, 0, 1))
        == 30
    )
    assert client.ask("DELETE", "/v1/memories/sent", headers=headers).status == 200
    assert client.ask("GET", "/v1/memories/sent", headers=headers).status == 404
    assert not [path for path in (served.folder / "memories").rglob("*") if "sent" in path.name]


def test_frames_over_a_websocket(served: Served) -> None:
    host, port = served.address
    headers = {"Authorization": f"Bearer {KEY}"}
    with connect(f"ws://{host}:{port}/v1/video/chat/stream", additional_headers=headers) as socket:

        def exchange(kind: str, **fields: Any) -> dict[str, Any]:
            socket.send(json.dumps({"type": kind, **fields}))
            return json.loads(socket.recv(PATIENCE))

        created = exchange("session.config", memory="door", max_tokens=5)
        assert created == {"type": "session.created", "memory": "door"}
        for number in range(5):
            data = BytesIO()
            Image.fromarray(board(number)).save(data, "PNG")
            sent = exchange("video.frame", data=base64.b64encode(data.getvalue()).decode())
            assert sent == {"type": "video.appended", "frames": number + 1}
        assert exchange("video.query", text=QUESTION) == {"type": "response.start"}
        events = []
        while not events or events[-1]["type"] != "response.text.done":
            events.append(json.loads(socket.recv(PATIENCE)))
        assert "".join(event["delta"] for event in events[:-1]) == events[-1]["text"]
        assert all(0 <= moment["start"] < moment["end"] <= 5 for moment in events[-1]["moments"])
        socket.send(json.dumps({"type": "video.done"}))
        with pytest.raises(ConnectionClosedOK):  # by the server, which has done all of it then
            socket.recv(PATIENCE)
    status = Client(served.address).ask("GET", "/v1/memories/door", headers=headers).json()
    assert (status["state"], status["frames"]) == ("ready", 5)
    repository = Repository(served.folder / "memories")
    assert verify(repository, "door") == []


def test_it_is_told_to_stop(served: Served) -> None:
    """The last test: a running answer comes to an end, what has been watched is kept, and the exit code is 0."""
    client, headers = Client(served.address), {"authorization": f"Bearer {KEY}"}
    body = {"messages": [{"role": "user", "content": "Tell me more."}], "max_tokens": 400, "stream": True}
    connection, response = client.open("POST", "/v1/chat/completions", body, headers)
    with contextlib.closing(connection):
        text = response.read1()
        assert client.ask("PUT", "/v1/memories/late", (served.folder / "film.mp4").read_bytes(), headers).status == 202
        served.process.terminate()
        text += response.read()
    *_, last, done = [line.removeprefix("data: ") for line in text.decode().splitlines() if line]
    ended = json.loads(last)
    code, choices = ended.get("error", {}).get("code"), ended.get("choices")
    assert code == "stopping" or choices[0]["finish_reason"] in ("stop", "length")
    assert done == "[DONE]"
    assert served.process.wait(PATIENCE) == 0
    repository = Repository(served.folder / "memories")
    assert [verify(repository, video.name) for video in repository.videos()] == [[]] * len(repository.videos())
