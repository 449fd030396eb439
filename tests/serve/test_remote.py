# SPDX-License-Identifier: Apache-2.0
"""Answers that a vLLM server writes are those that are written here; whatever that server does ends one answer alone.

Nearly all of this asks a stand-in, with transformers behind it. The last test asks a real one, which serves the decoder
of `tiny`: pytest tests/serve/test_remote.py --vllm http://127.0.0.1:8001
"""

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from listeners import QUESTIONS, Listener, asks
from memories import make_frames
from servers import until
from transformers import AutoModelForCausalLM

from hourllava import VideoMemory, load_model
from hourllava.data import Film
from hourllava.errors import BusyError, DecoderError, InputError, QuestionError
from hourllava.model import AskOptions, HourLlavaForConditionalGeneration, Prepared, convert_decoder, prepare
from hourllava.serve import Began, Ended, Failed, RemoteDecoder, RemoteEngine, Sampling, Written
from hourllava.serve.problems import problem_of

Piece = dict[str, Any]


@dataclass(eq=False)
class StandIn:
    """What a vLLM server does that serves a decoder, greedily, as far as `RemoteDecoder` asks it."""

    decoder: Any
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)  # requests, without their rows
    left: list[bool] = field(default_factory=list)  # of each answer, whether nobody listened any more
    listed: Any = field(default_factory=lambda: {"data": [{"id": "decoder", "max_model_len": 4096}]})
    change: Callable[[list[Piece]], Iterator[Piece | bytes]] = iter  # what becomes of an answer's events

    def answer(self, asked: dict[str, Any]) -> list[Piece]:
        """The events of an answer, one token each."""
        rows = torch.load(io.BytesIO(base64.b64decode(asked["prompt_embeds"])), weights_only=True)
        assert rows.dim() == 2
        limit, ends = asked["max_tokens"], asked.get("stop_token_ids", [])
        with torch.no_grad():
            options = {"max_new_tokens": limit, "do_sample": False, "eos_token_id": ends or None, "pad_token_id": 0}
            mask = torch.ones(1, len(rows), dtype=torch.int64)
            tokens = self.decoder.generate(inputs_embeds=rows[None], attention_mask=mask, **options)[0].tolist()
        pieces = [{"choices": [{"index": 0, "token_ids": [token], "finish_reason": None}]} for token in tokens]
        pieces[-1]["choices"][0]["finish_reason"] = "stop" if tokens[-1] in ends else "length"
        return pieces


def serve(stand_in: StandIn) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, stand_in.listed) if self.path == "/v1/models" else self.reply(404, {})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            rows = torch.load(io.BytesIO(base64.b64decode(asked["prompt_embeds"])), weights_only=True)
            stand_in.asked.append({name: value for name, value in asked.items() if name != "prompt_embeds"})
            width = stand_in.decoder.config.hidden_size
            if self.path != "/v1/completions" or rows.shape[1] != width:
                why = f"`prompt_embeds` hidden_size {rows.shape[1]} does not match\nthe model's hidden_size {width}."
                return self.reply(400, {"error": {"message": why, "code": 400}})
            self.send_response(200)
            self.end_headers()
            try:
                for piece in stand_in.change(stand_in.answer(asked)):
                    sent = piece if isinstance(piece, bytes) else b"data: " + json.dumps(piece).encode()
                    self.wfile.write(sent + b"\n\n")
                stand_in.left.append(False)
            except OSError:
                stand_in.left.append(True)

        def reply(self, status: int, body: Any) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


@pytest.fixture(scope="module")
def memory(model: HourLlavaForConditionalGeneration) -> VideoMemory:
    return model.watch(make_frames(20), progress=False)


@pytest.fixture(scope="module")
def decoder(model: HourLlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")
    model.save_pretrained(folder / "model")
    convert_decoder(folder / "model", folder / "decoder")
    return AutoModelForCausalLM.from_pretrained(folder / "decoder").eval()


@pytest.fixture
def stand_in(decoder: Any) -> Iterator[StandIn]:
    stand_in = StandIn(decoder)
    server = serve(stand_in)
    yield stand_in
    server.shutdown()
    server.server_close()


@pytest.fixture
def engine(model: HourLlavaForConditionalGeneration, stand_in: StandIn) -> Iterator[RemoteEngine]:
    engine = RemoteEngine(model, RemoteDecoder(stand_in.url), max_batch=3)
    stand_in.asked.clear()
    stand_in.left.clear()
    yield engine
    engine.close()


def test_answers_are_those_written_here(model, memory, stand_in, engine) -> None:
    listeners = [Listener() for _ in QUESTIONS * 2]
    for number, listener in enumerate(listeners):
        engine.submit(asks(model, memory, QUESTIONS[number % 4]), Sampling(1 + 7 * number % 12), listener)
    for number, listener in enumerate(listeners):
        most = 1 + 7 * number % 12
        assert listener.last == Ended("length", most)
        alone = model.ask(memory, QUESTIONS[number % 4], max_new_tokens=most)
        assert listener.text == alone.text
        began = listener.events[0]
        assert isinstance(began, Began)
        assert began.mass.equal(alone.mass)
        assert began.prompt_tokens == prepare(model, memory, QUESTIONS[number % 4], AskOptions()).embeds.shape[1]
    until(lambda: engine.counts() == (0, 0))


def test_what_is_asked_of_the_server(model, memory, stand_in, engine) -> None:
    listener = Listener()
    engine.submit(asks(model, memory, "What?"), Sampling(5, 0.5, 0.9, 7, ("zzz",)), listener)
    assert isinstance(listener.last, Ended)
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    wanted = {"model": "decoder", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["zzz"]}
    assert stand_in.asked == [wanted | {"stop_token_ids": [end], "stream": True, "return_token_ids": True}]


def test_an_answer_ends_at_its_end_token_and_at_stop_texts(model, memory, stand_in, engine) -> None:
    tokens = [piece["choices"][0]["token_ids"][0] for piece in written(stand_in, model, memory, 12)]
    engine._end = tokens[4]  # as if the model had learnt to end there
    ended, stopped = Listener(), Listener()
    engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(12), ended)
    assert ended.last == Ended("stop", tokens.index(tokens[4]))
    engine._end = 2
    whole = model.ask(memory, QUESTIONS[0], max_new_tokens=12).text
    engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(12, stop=(whole[5:7],)), stopped)
    assert stopped.last.reason == "stop"
    assert stopped.text == whole[: whole.index(whole[5:7])].rstrip()


def written(stand_in: StandIn, model: Any, memory: VideoMemory, most: int) -> list[Piece]:
    packed = io.BytesIO()
    torch.save(prepare(model, memory, QUESTIONS[0], AskOptions()).embeds[0], packed)
    return stand_in.answer({"prompt_embeds": base64.b64encode(packed.getvalue()), "max_tokens": most})


def test_several_tokens_at_a_time_and_events_without_any(model, memory, stand_in, engine) -> None:
    def bundled(pieces: list[Piece]) -> Iterator[Piece | bytes]:
        yield b": nothing yet"
        tokens = [token for piece in pieces for token in piece["choices"][0]["token_ids"]]
        yield {"choices": [{"token_ids": tokens, "finish_reason": None}]}
        yield {"choices": [{"token_ids": None, "finish_reason": "length"}]}
        yield {"choices": [], "usage": {"completion_tokens": len(tokens)}}
        yield b"data: [DONE]"

    stand_in.change, listener = bundled, Listener()
    engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(9), listener)
    assert listener.last == Ended("length", 9)
    whole = model.ask(memory, QUESTIONS[0], max_new_tokens=9).text
    assert listener.text == whole
    stop = next(letter for letter in whole if letter.isascii() and letter.isalpha())
    engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(9, stop=(stop,)), stopped := Listener())
    assert stopped.last.reason == "stop"
    assert stopped.last.completion_tokens < 9
    assert stopped.text == whole[: whole.index(stop)].rstrip()


def halt(pieces: list[Piece], *last: Piece | bytes) -> Iterator[Piece | bytes]:
    yield from pieces[:2]
    yield from last


FAILURES: dict[str, tuple[Callable[[list[Piece]], Iterator[Piece | bytes]], str]] = {
    "it breaks off": (lambda pieces: halt(pieces), "it broke off in the middle of an answer (None)"),
    "it gives up": (
        lambda pieces: halt(pieces, {"choices": [{"token_ids": [], "finish_reason": "abort"}]}),
        "it broke off in the middle of an answer (abort)",
    ),
    "an error": (
        lambda pieces: halt(pieces, {"error": {"message": "the engine\nis dead", "code": 500}}),
        "it broke off (the engine is dead)",
    ),
    "no event": (lambda pieces: halt(pieces, b"data: <html>"), "it broke off (it does not say why)"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_an_answer_fails_alone(model, memory, stand_in, engine, case) -> None:
    stand_in.change, why = FAILURES[case]
    listener, other = Listener(), Listener()
    engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(5), listener)
    failed = listener.last
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, DecoderError)
    assert str(failed.error) == f"{stand_in.url}: {why}; look into its log"
    assert sum(isinstance(event, Written) for event in listener.events) <= 2
    problem = problem_of(failed.error)
    assert (problem.status, problem.code) == (502, "decoder")
    stand_in.change = iter
    engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(5), other)
    assert other.last == Ended("length", 5)


def test_a_server_that_has_gone(model, memory, decoder) -> None:
    stand_in = StandIn(decoder)
    server = serve(stand_in)
    engine, listener = RemoteEngine(model, RemoteDecoder(stand_in.url)), Listener()
    server.shutdown()
    server.server_close()
    engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(5), listener)
    failed = listener.last
    assert isinstance(failed, Failed)
    assert str(failed.error).startswith(f"{stand_in.url}: it cannot be reached (Connection refused); start `vllm serve")
    engine.close()


def test_cancelling_hangs_up(model, memory, stand_in, engine) -> None:
    more = threading.Event()

    def slow(pieces: list[Piece]) -> Iterator[Piece | bytes]:
        yield from pieces[:3]
        assert more.wait(60)
        for _ in range(1000):  # a closed connection is noticed by the second that writes into it
            yield pieces[0]

    stand_in.change, listener = slow, Listener()
    ticket = engine.submit(asks(model, memory, QUESTIONS[3]), Sampling(5), listener)
    until(lambda: any(isinstance(event, Written) for event in listener.events))
    ticket.cancel()
    assert listener.last == Ended("cancelled", 3)  # while the server says nothing
    more.set()
    until(lambda: stand_in.left == [True])
    until(lambda: engine.counts() == (0, 0))


def test_cancelled_before_its_turn(model, memory, engine) -> None:
    ready, going = threading.Event(), threading.Event()

    def waits() -> Prepared:
        going.set()
        assert ready.wait(60)
        return asks(model, memory, QUESTIONS[0])()

    first, second = Listener(), Listener()
    held = engine.submit(waits, Sampling(5), first)
    ticket = engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(5), second)
    assert going.wait(60)
    ticket.cancel()
    held.cancel()  # while it is prepared
    ready.set()
    assert [first.last, second.last] == [Ended("cancelled", 0)] * 2
    assert second.events == [Ended("cancelled", 0)]


def test_no_more_than_so_many_at_a_time(model, memory, stand_in) -> None:
    more = threading.Event()

    def held(pieces: list[Piece]) -> Iterator[Piece | bytes]:
        assert more.wait(60)
        yield from pieces

    engine = RemoteEngine(model, RemoteDecoder(stand_in.url), max_batch=2, max_waiting=2)
    stand_in.change, listeners = held, [Listener() for _ in range(4)]
    for listener in listeners[:2]:
        engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(3), listener)
    until(lambda: engine.counts() == (0, 2))
    for listener in listeners[2:]:
        engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(3), listener)
    with pytest.raises(BusyError, match="2 questions are waiting"):
        engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(3), Listener())
    time.sleep(0.2)  # in which a question would be taken, if more might run
    assert engine.counts() == (2, 2)
    more.set()
    assert [listener.last for listener in listeners] == [Ended("length", 3)] * 4
    more.clear()
    for number, listener in enumerate(last := [Listener() for _ in range(3)]):
        engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(3), listener)
        until(lambda number=number: sum(engine.counts()) == number + 1 and engine.counts()[1] == min(number + 1, 2))
    engine.close()
    more.set()
    assert [listener.last for listener in last] == [Ended("cancelled", 0)] * 3


def test_a_question_fails_alone(model, memory, engine) -> None:
    bad, long, good = Listener(), Listener(), Listener()
    engine.submit(asks(model, memory, " "), Sampling(5), bad)
    engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(4096), long)
    engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(5), good)
    assert isinstance(bad.last, Failed)
    assert isinstance(bad.last.error, QuestionError)
    assert isinstance(long.last, Failed)
    assert "4096 are asked for" in str(long.last.error)
    assert good.last == Ended("length", 5)


def test_the_server_s_own_limit_counts(model, memory, stand_in) -> None:
    length = prepare(model, memory, QUESTIONS[0], AskOptions()).embeds.shape[1]
    for extra, last in ((6, Ended("length", 6)), (0, None)):
        stand_in.listed = {"data": [{"id": "decoder", "max_model_len": length + extra}]}
        engine, listener = RemoteEngine(model, RemoteDecoder(stand_in.url)), Listener()
        engine.submit(asks(model, memory, QUESTIONS[0]), Sampling(), listener)
        if last is None:
            assert isinstance(listener.last, Failed)
            assert isinstance(listener.last.error, InputError)
            assert f"the decoder reads {length} rows, and the question has {length}" in str(listener.last.error)
        else:
            assert listener.last == last
        engine.close()


@pytest.mark.parametrize(
    ("listed", "why"), [({"data": []}, "it names no model"), ({"data": ["x"]}, "it names no model"), ([], "no model")]
)
def test_a_server_of_another_kind(model, stand_in, listed, why) -> None:
    stand_in.listed = listed
    with pytest.raises(DecoderError, match=why):
        RemoteEngine(model, RemoteDecoder(stand_in.url))


def test_a_decoder_of_another_model(model, stand_in, monkeypatch) -> None:
    monkeypatch.setattr(model.config.text_config, "hidden_size", 128)
    with pytest.raises(DecoderError) as refused:
        RemoteEngine(model, RemoteDecoder(stand_in.url))
    why = "it answered with status 400 (`prompt_embeds` hidden_size 128 does not match the model's hidden_size 96.)"
    assert why in str(refused.value)
    with pytest.raises(DecoderError, match="it answered with status 404 \\(it does not say why\\)"):
        RemoteDecoder(f"{stand_in.url}/elsewhere").served()


@pytest.mark.parametrize("url", ["vllm:8001", "http://", "ftp://a", "http://a:b", "http://a:99999", ""])
def test_addresses(url: str) -> None:
    with pytest.raises(DecoderError, match=r"it is no address; give one as http://127\.0\.0\.1:8001"):
        RemoteDecoder(url)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_addresses_with_and_without_a_version(stand_in: StandIn, end: str) -> None:
    assert RemoteDecoder(stand_in.url + end).served() == ("decoder", 4096)


def test_a_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hourllava.serve.remote.PATIENCE", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        decoder = RemoteDecoder(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(DecoderError, match="it cannot be reached \\(timed out\\)"):
            decoder.served()


def test_a_real_vllm(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    url = pytestconfig.getoption("--vllm")
    if not url:
        pytest.skip("NOT TESTED: --vllm names no server")
    model, film = load_model("tiny"), Film.random(2**50, 600)
    film.write(tmp_path / "film.mp4", progress=False)
    memory = model.watch(tmp_path / "film.mp4", progress=False)
    engine, questions = RemoteEngine(model, RemoteDecoder(url)), film.questions()
    listeners = [Listener() for _ in questions]
    for question, listener in zip(questions, listeners, strict=True):
        engine.submit(asks(model, memory, question.text), Sampling(16), listener)
    assert {listener.last.reason for listener in listeners} == {"stop"}
    assert [listener.text for listener in listeners] == [model.ask(memory, q.text).text for q in questions]
    engine.close()
