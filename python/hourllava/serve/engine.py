# SPDX-License-Identifier: Apache-2.0
"""The engine of a server: one thread that prepares questions as they come and writes all running answers together."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .batch import DecodingBatch
from .questions import Began, Ended, Questions, Ticket, room_for
from .wording import Chooser, Wording

if TYPE_CHECKING:
    from hourllava.model import HourLlavaForConditionalGeneration


@dataclass(eq=False)
class _Answer:
    """One that is being written."""

    ticket: Ticket
    chooser: Chooser
    wording: Wording
    room: int  # tokens that it may still take
    token: int = 0  # the last one
    written: int = 0


class Engine(Questions):
    """Answers questions of any number of threads.

    A question is prepared (forgetting, retrieval, MemAug, the decoder's reading of the prompt) when there is room for
    it, one between two tokens of the answers that are running, so that these never wait for more than one.

    Args:
        model: which nothing else changes meanwhile; others may watch videos with it.
        max_batch: answers that are written together.
        max_waiting: questions that wait for that; more are refused.
    """

    def __init__(self, model: "HourLlavaForConditionalGeneration", max_batch: int = 8, max_waiting: int = 256) -> None:
        super().__init__(max_waiting)
        self._model, self._max_batch = model, max_batch
        self._end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self._running: list[_Answer] = []
        self._batch = DecodingBatch(model)
        self._thread.start()

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
        self._running, self._batch = [], DecodingBatch(self._model)
        self._cancel_waiting()

    def _begin(self, ticket: Ticket) -> None:
        """Prepare a question and choose the first token of its answer."""
        if ticket.cancelled:
            self._tell(ticket, Ended("cancelled", 0))
            return
        before = len(self._batch)
        try:
            prepared = ticket.prepare()
            length = prepared.embeds.shape[1]
            limit = self._model.config.text_config.max_position_embeddings
            room = room_for(limit, length, ticket.sampling.max_new_tokens)
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
                self._give_out(answer.ticket, answer.wording.add(token))

    def _drop_done(self) -> None:
        """End the answers that are complete or cancelled, and leave them out of the batch."""
        going = []
        for row, answer in enumerate(self._running):
            complete = answer.token == self._end or answer.wording.stopped
            if not (complete or answer.room <= 0 or answer.ticket.cancelled):
                going.append(row)
                continue
            if not answer.wording.stopped:
                self._give_out(answer.ticket, answer.wording.rest())
            reason = "stop" if complete else "length" if answer.room <= 0 else "cancelled"
            self._tell(answer.ticket, Ended(reason, answer.written))  # type: ignore[arg-type]
        if len(going) < len(self._running):
            self._running = [self._running[row] for row in going]
            self._batch.keep(going)
