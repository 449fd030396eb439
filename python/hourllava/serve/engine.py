# SPDX-License-Identifier: Apache-2.0
"""The engine of a server: one thread that prepares questions as they come and writes all running answers together."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hourllava.errors import BusyError, HourLlavaError, InputError
from hourllava.model import Prepared

from .batch import DecodingBatch
from .wording import Chooser, Sampling, Wording

if TYPE_CHECKING:
    from hourllava.model import HourLlavaForConditionalGeneration

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Began:
    """A question has been prepared; its answer follows."""

    prompt_tokens: int  # rows that the decoder reads
    mass: Tensor | None  # (T,) float32: each second's share of the question's attention; None without a memory


@dataclass(frozen=True)
class Written:
    """Some more of an answer."""

    text: str  # whole characters


@dataclass(frozen=True)
class Ended:
    """An answer is complete."""

    reason: Literal["stop", "length", "cancelled"]
    completion_tokens: int


@dataclass(frozen=True)
class Failed:
    """There will be no answer, or no more of it."""

    error: Exception


Event = Began | Written | Ended | Failed


@dataclass(eq=False)
class Ticket:
    """A question that was handed in."""

    prepare: Callable[[], Prepared]
    sampling: Sampling
    on_event: Callable[[Event], None]
    cancelled: bool = field(default=False, init=False)

    def cancel(self) -> None:
        """Write no more of the answer; it ends as "cancelled" unless it is complete."""
        self.cancelled = True


@dataclass(eq=False)
class _Answer:
    """One that is being written."""

    ticket: Ticket
    chooser: Chooser
    wording: Wording
    room: int  # tokens that it may still take
    token: int = 0  # the last one
    written: int = 0


class Engine:
    """Answers questions of any number of threads.

    A question is prepared (forgetting, retrieval, MemAug, the decoder's reading of the prompt) when there is room for
    it, one between two tokens of the answers that are running, so that these never wait for more than one.

    Args:
        model: which nothing else changes meanwhile; others may watch videos with it.
        max_batch: answers that are written together.
        max_waiting: questions that wait for that; more are refused.
    """

    def __init__(self, model: "HourLlavaForConditionalGeneration", max_batch: int = 8, max_waiting: int = 256) -> None:
        self._model, self._max_batch, self._max_waiting = model, max_batch, max_waiting
        self._end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._running: list[_Answer] = []
        self._batch = DecodingBatch(model)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    def submit(self, prepare: Callable[[], Prepared], sampling: Sampling, on_event: Callable[[Event], None]) -> Ticket:
        """Hand in a question.

        Args:
            prepare: makes the decoder's input, on the engine's thread; what it raises ends the question alone.
            sampling: how the answer is written.
            on_event: told what happens, on the engine's thread, which it must not hold up: `Began` unless the question
                fails or is cancelled before, `Written` as text comes, and in the end once `Ended` or `Failed`.

        Raises:
            BusyError: too many questions are waiting, or the engine has been closed.
        """
        ticket = Ticket(prepare, sampling, on_event)
        with self._changed:
            if self._closing:
                raise BusyError("server", "it is being closed", "ask again when it has been started again")
            if len(self._waiting) >= self._max_waiting:
                raise BusyError("server", f"{len(self._waiting)} questions are waiting", "ask again in a moment")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def counts(self) -> tuple[int, int]:
        """Questions that wait, and answers that are being written."""
        return len(self._waiting), len(self._running)

    def close(self) -> None:
        """End all answers as "cancelled", and the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._closing):
                    self._changed.wait()
                if self._closing:
                    break
                room = len(self._running) < self._max_batch
                ticket = self._waiting.popleft() if room and self._waiting else None
            try:
                if ticket is not None:
                    self._begin(ticket)
                if self._running:
                    self._advance()
            except Exception as error:  # what is left of the batch is not to be trusted
                self._fail([answer.ticket for answer in self._running], error)
                self._running, self._batch = [], DecodingBatch(self._model)
        for answer in self._running:
            self._tell(answer.ticket, Ended("cancelled", answer.written))
        for ticket in self._waiting:
            self._tell(ticket, Ended("cancelled", 0))
        self._running, self._batch = [], DecodingBatch(self._model)
        self._waiting.clear()

    def _begin(self, ticket: Ticket) -> None:
        """Prepare a question and choose the first token of its answer."""
        if ticket.cancelled:
            self._tell(ticket, Ended("cancelled", 0))
            return
        before = len(self._batch)
        try:
            prepared = ticket.prepare()
            length = prepared.embeds.shape[1]
            room = self._room(length, ticket.sampling.max_new_tokens)
            chooser = Chooser(ticket.sampling, prepared.embeds.device)
            answer = _Answer(ticket, chooser, Wording(self._model.tokenizer, ticket.sampling.stop), room)
            self._tell(ticket, Began(length, prepared.mass))
            logits = self._batch.add(prepared.embeds)
            self._running.append(answer)
            self._take([answer], [chooser.choose(logits)])
        except Exception as error:
            self._fail([ticket], error)
            self._running = [other for other in self._running if other.ticket is not ticket]
            self._batch.keep(list(range(before)))
            return
        self._drop_done()

    def _room(self, length: int, asked: int | None) -> int:
        """How many tokens an answer to a prompt of so many rows may take.

        Raises:
            InputError: more are asked for than the decoder has room for.
        """
        room = self._model.config.text_config.max_position_embeddings - length
        if asked is not None and asked > room:
            why = f"{asked} are asked for, but beside the question's {length} the decoder has room for {room}"
            raise InputError("max_tokens", why, "ask for fewer, or leave it out")
        return asked or room

    def _advance(self) -> None:
        """One more token for each running answer."""
        last = torch.tensor([answer.token for answer in self._running], device=self._model.device)
        logits = self._batch.step(last)
        self._take(self._running, [a.chooser.choose(row) for a, row in zip(self._running, logits, strict=True)])
        self._drop_done()

    def _take(self, answers: list[_Answer], tokens: list[Tensor]) -> None:
        """Give each answer its next token, which are waited for all at once."""
        for answer, token in zip(answers, torch.stack(tokens).tolist(), strict=True):
            answer.token = token
            answer.room -= 1
            if token != self._end:
                answer.written += 1
                self._write(answer, answer.wording.add(token))

    def _drop_done(self) -> None:
        """End the answers that are complete or cancelled, and leave them out of the batch."""
        going = []
        for row, answer in enumerate(self._running):
            complete = answer.token == self._end or answer.wording.stopped
            if not (complete or answer.room <= 0 or answer.ticket.cancelled):
                going.append(row)
                continue
            if not answer.wording.stopped:
                self._write(answer, answer.wording.rest())
            reason = "stop" if complete else "length" if answer.room <= 0 else "cancelled"
            self._tell(answer.ticket, Ended(reason, answer.written))  # type: ignore[arg-type]
        if len(going) < len(self._running):
            self._running = [self._running[row] for row in going]
            self._batch.keep(going)

    def _write(self, answer: _Answer, text: str) -> None:
        if text:
            self._tell(answer.ticket, Written(text))

    def _fail(self, tickets: list[Ticket], error: Exception) -> None:
        if not isinstance(error, HourLlavaError):
            _log.exception("an answer failed")
        for ticket in tickets:
            self._tell(ticket, Failed(error))

    def _tell(self, ticket: Ticket, event: Event) -> None:
        try:
            ticket.on_event(event)
        except Exception:  # nobody listens any more
            _log.exception("an answer has nobody to go to")
            ticket.cancel()
