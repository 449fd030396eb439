# SPDX-License-Identifier: Apache-2.0
"""Questions that wait for their turn, and what those who asked them are told."""

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from hourllava.errors import BusyError, HourLlavaError, InputError
from hourllava.model import Prepared

from .wording import Sampling

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
    _stop: Callable[[], object] = field(default=bool, init=False)

    def cancel(self) -> None:
        """Write no more of the answer; it ends as "cancelled" unless it is complete."""
        self.cancelled = True
        self._stop()

    def when_cancelled(self, stop: Callable[[], object]) -> None:
        """Have something done, on the thread that cancels it, if that comes to pass, or has come."""
        self._stop = stop
        if self.cancelled:
            stop()


class Questions(ABC):
    """A queue of questions of any number of threads, and the thread that takes them from it.

    Args:
        max_waiting: questions that wait; more are refused.
    """

    _running: Sized = ()  # answers that are being written

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    def submit(self, prepare: Callable[[], Prepared], sampling: Sampling, on_event: Callable[[Event], None]) -> Ticket:
        """Hand in a question.

        Args:
            prepare: makes the decoder's input, on the engine's thread; what it raises ends the question alone.
            sampling: how the answer is written.
            on_event: told what happens, on a thread of the engine, which it must not hold up: `Began` unless the
                question fails or is cancelled before, `Written` as text comes, and in the end once `Ended` or `Failed`.

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

    @abstractmethod
    def _run(self) -> None:
        """What the thread does until the engine is closed."""

    def _cancel_waiting(self) -> None:
        for ticket in self._waiting:
            self._tell(ticket, Ended("cancelled", 0))
        self._waiting.clear()

    def _give_out(self, ticket: Ticket, text: str) -> None:
        """Tell what is certain of an answer's text, if there is any."""
        if text:
            self._tell(ticket, Written(text))

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


def room_for(limit: int, length: int, asked: int | None) -> int:
    """How many tokens an answer may take that follows `length` rows, of a decoder that reads `limit`.

    Raises:
        InputError: more are asked for than there is room for, or there is none.
    """
    room = limit - length
    if room < 1:
        why = f"the decoder reads {limit} rows, and the question has {length}"
        raise InputError("messages", why, "ask something shorter, or give the decoder more room")
    if asked is not None and asked > room:
        why = f"{asked} are asked for, but beside the question's {length} the decoder has room for {room}"
        raise InputError("max_tokens", why, "ask for fewer, or leave it out")
    return asked or room
