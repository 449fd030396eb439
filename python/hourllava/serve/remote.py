# SPDX-License-Identifier: Apache-2.0
"""Answers that a vLLM server writes: this process prepares each question, and sends the rows that the decoder reads."""

import base64
import contextlib
import io
import json
import socket
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from hourllava.errors import DecoderError

from .fetching import connection_reason
from .questions import Began, Ended, Questions, Ticket, room_for
from .wording import Wording

if TYPE_CHECKING:
    from hourllava.model import HourLlavaForConditionalGeneration

CONNECT, PATIENCE = 10, 300  # seconds for a connection, and without a sign of a server that has others to answer first
START = "start `vllm serve DIR --enable-prompt-embeds` on what `hourllava convert MODEL --decoder -o DIR` wrote"
LOOK = "look into its log"


class RemoteDecoder:
    """A vLLM server that has a model's decoder.

    Args:
        url: of the server, with or without `/v1`.

    Raises:
        DecoderError: it is no http(s) address.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            place = urlsplit(url)
            self._address, known = (place.hostname or "", place.port), place.scheme in ("http", "https")
        except ValueError:  # a port that is none
            known = False
        if not known or not self._address[0]:
            raise DecoderError(url, "it is no address", "give one as http://127.0.0.1:8001")
        self._connection = HTTPSConnection if place.scheme == "https" else HTTPConnection
        self._path = place.path.rstrip("/").removesuffix("/v1")

    def served(self) -> tuple[str, int | None]:
        """What the server calls its model, and how many rows it reads at most, if it says that.

        Raises:
            DecoderError: it cannot be reached, or serves nothing.
        """
        with self._response("GET", "/v1/models") as response:
            listed = _object(response.read()).get("data")
        first = listed[0] if isinstance(listed, list) and listed else None
        if not isinstance(first, dict) or "id" not in first:
            raise DecoderError(self.url, "it names no model", START)
        return first["id"], first.get("max_model_len")

    def write(
        self, rows: Tensor, ticket: Ticket | None = None, **options: Any
    ) -> Generator[tuple[list[int], str | None], None, None]:
        """What follows rows (M, C): tokens as they come, and with the last of them why it ends there.

        Args:
            ticket: when it is cancelled, the connection is closed, and the server writes no more.
            options: of the request, as vLLM's completions take them.

        Raises:
            DecoderError: the server cannot be reached, refuses, or breaks off.
        """
        packed = io.BytesIO()
        torch.save(rows.cpu(), packed)
        prompt = base64.b64encode(packed.getvalue()).decode()
        body = {"prompt_embeds": prompt, "stream": True, "return_token_ids": True, **options}
        with self._response("POST", "/v1/completions", body, ticket) as response:
            try:
                for line in response:
                    event = line.removeprefix(b"data:").strip()
                    if not line.startswith(b"data:") or event == b"[DONE]":
                        continue
                    told = _object(event)
                    if "choices" not in told:
                        raise DecoderError(self.url, f"it broke off ({_why(told)})", LOOK)
                    for choice in told["choices"]:
                        yield choice.get("token_ids") or [], choice.get("finish_reason")
            except (OSError, HTTPException) as error:
                why = f"it broke off in the middle of an answer ({connection_reason(error)})"
                raise DecoderError(self.url, why, LOOK) from error

    @contextlib.contextmanager
    def _response(
        self, method: str, path: str, body: Any = None, ticket: Ticket | None = None
    ) -> Iterator[HTTPResponse]:
        connection = self._connection(*self._address, timeout=CONNECT)
        sent = None if body is None else json.dumps(body).encode()
        with contextlib.closing(connection):
            try:
                connection.connect()
                connection.sock.settimeout(PATIENCE)
                if ticket is not None:
                    ticket.when_cancelled(partial(_hang_up, connection.sock))
                connection.request(method, self._path + path, sent, {"content-type": "application/json"})
                response = connection.getresponse()
                refusal = None if response.status == 200 else response.read()
            except (OSError, HTTPException) as error:
                raise DecoderError(self.url, f"it cannot be reached ({connection_reason(error)})", START) from error
            if refusal is not None:
                why = f"it answered with status {response.status} ({_why(_object(refusal))})"
                raise DecoderError(self.url, why, START)
            yield response


class RemoteEngine(Questions):
    """Answers questions of any number of threads, and leaves the writing to a vLLM server.

    One question after the other is prepared (forgetting, retrieval, MemAug) while the server writes those before it.

    Args:
        model: whose decoder the server has; nothing else changes it meanwhile.
        decoder: that server.
        max_batch: answers that are written at a time.
        max_waiting: questions that wait for that; more are refused.

    Raises:
        DecoderError: the server cannot be reached, or does not read rows of this model.
    """

    def __init__(
        self,
        model: "HourLlavaForConditionalGeneration",
        decoder: RemoteDecoder,
        max_batch: int = 64,
        max_waiting: int = 256,
    ) -> None:
        super().__init__(max_waiting)
        self._model, self._decoder, self._max_batch = model, decoder, max_batch
        self._end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self._name, read = decoder.served()
        config = model.config.text_config
        self._limit = min(config.max_position_embeddings, read or config.max_position_embeddings)
        row = torch.zeros(1, config.hidden_size, dtype=model.dtype)
        for _ in decoder.write(row, model=self._name, max_tokens=1):  # so that a wrong server is told now
            pass
        self._running: list[Ticket] = []
        self._writers = ThreadPoolExecutor(max_batch, "decoder")
        self._thread.start()

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or (self._waiting and len(self._running) < self._max_batch)):
                    self._changed.wait()
                if self._closing:
                    break
                ticket = self._waiting.popleft()
            self._begin(ticket)
        for ticket in self._running.copy():
            ticket.cancel()
        self._writers.shutdown()
        self._cancel_waiting()

    def _begin(self, ticket: Ticket) -> None:
        """Prepare a question and let its answer be written."""
        if ticket.cancelled:
            self._tell(ticket, Ended("cancelled", 0))
            return
        try:
            prepared = ticket.prepare()
            length = prepared.embeds.shape[1]
            room = room_for(self._limit, length, ticket.sampling.max_new_tokens)
        except Exception as error:
            self._fail([ticket], error)
            return
        self._tell(ticket, Began(length, prepared.mass))
        with self._changed:
            self._running.append(ticket)
        self._writers.submit(self._write, ticket, prepared.embeds[0], room)

    def _write(self, ticket: Ticket, rows: Tensor, room: int) -> None:
        """Tell what the server writes, on a thread for this answer."""
        try:
            self._tell(ticket, self._written(ticket, rows, room))
        except Exception as error:
            self._fail([ticket], error)
        finally:
            with self._changed:
                self._running.remove(ticket)
                self._changed.notify()

    def _written(self, ticket: Ticket, rows: Tensor, room: int) -> Ended:
        sampling, written, reason = ticket.sampling, 0, None
        wording = Wording(self._model.tokenizer, sampling.stop)
        options = {"model": self._name, "max_tokens": room, "temperature": sampling.temperature}
        options |= {"top_p": sampling.top_p, "seed": sampling.seed, "stop": list(sampling.stop)}
        pieces = self._decoder.write(rows, ticket, **options, stop_token_ids=[self._end])
        try:
            with contextlib.closing(pieces):
                for tokens, ended in pieces:
                    reason = ended
                    for token in tokens:
                        if token != self._end and not wording.stopped:
                            written += 1
                            self._give_out(ticket, wording.add(token))
                    if wording.stopped:
                        return Ended("stop", written)
            if reason not in ("stop", "length"):
                raise DecoderError(self._decoder.url, f"it broke off in the middle of an answer ({reason})", LOOK)
        except DecoderError:
            if ticket.cancelled:  # and the connection closed for that
                return Ended("cancelled", written)
            raise
        self._give_out(ticket, wording.rest())
        return Ended("stop" if reason == "stop" else "length", written)


def _hang_up(connection: socket.socket) -> None:
    """End a connection that another thread reads from."""
    with contextlib.suppress(OSError):  # it has ended
        connection.shutdown(socket.SHUT_RDWR)


def _object(text: bytes) -> dict[str, Any]:
    """A JSON object; an empty one for what is none."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _why(told: dict[str, Any]) -> str:
    """What a response says that went wrong, in one line."""
    error = told.get("error", told)
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(message).split()) if message else "it does not say why"
