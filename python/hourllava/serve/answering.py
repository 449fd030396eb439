# SPDX-License-Identifier: Apache-2.0
"""From a conversation to the events of its answer: the video is found and watched, then the engine is asked."""

import asyncio
import time
import unicodedata
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from anyio.to_thread import run_sync

from hourllava.errors import AdmissionError, InputError, MemoryFileError
from hourllava.memory.repository import check_name
from hourllava.model import Moment, Prepared, find_moments, prepare
from hourllava.model.budget import as_budget

from .chat import Conversation
from .metrics import Metrics
from .pictures import load_pictures
from .problems import ApiError
from .prompts import prepare_pictures
from .questions import Began, Ended, Event, Failed, Questions, Ticket, Written
from .schemas import Wishes
from .sources import SourcePolicy

if TYPE_CHECKING:
    from torch import Tensor

    from hourllava.model import HourLlavaForConditionalGeneration

    from .jobs import Status
    from .library import Library

Result = TypeVar("Result")
BYTES_A_TOKEN = 16  # at most, on average over a whole conversation: words have about four
CURVE_BINS = 720  # of the attention over time that is sent: as many as a page is wide
FIRST_LOOK, LONGEST_LOOK = 0.05, 1.0  # seconds between two looks at a video that is being watched


@dataclass(eq=False)
class Service:
    """What the routes share.

    Args:
        model_name: what clients call the model.
        policy: where images may be taken from.
        key: what they have to know; None asks nobody.
        local: only this machine is listened to, so that a page which calls itself by another name is no friend.
    """

    model: "HourLlavaForConditionalGeneration"
    model_name: str
    engine: Questions
    library: "Library"
    metrics: Metrics
    policy: SourcePolicy
    key: str | None = None
    local: bool = True
    started: int = field(default_factory=lambda: int(time.time()))
    stopping: asyncio.Event = field(default_factory=asyncio.Event)  # set when no answer may begin any more


class RunningAnswer:
    """An answer while it is written: its events for one reader on the event loop.

    Args:
        prepare: makes the decoder's input, on the engine's thread.
        wishes: how it is to be written.

    Raises:
        BusyError: too many questions are waiting.
    """

    def __init__(self, service: Service, prepare: Callable[[], Prepared], wishes: Wishes) -> None:
        self._service, self._asked, self._first = service, time.perf_counter(), True
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def on_event(event: Event) -> None:
            self._count(event)
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._ticket: Ticket = service.engine.submit(prepare, wishes.sampling(), on_event)

    async def next(self) -> Began | Written | Ended:
        """The next event; `Ended` is the last.

        Raises:
            ApiError: the server is being closed.
            Exception: what kept the question from being prepared, or the answer from being written.
        """
        event = await self._events.get()
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Ended) and event.reason == "cancelled":
            raise stopping()
        return event

    def _count(self, event: Event) -> None:
        """Put an event into the metrics, whether or not there still is someone who reads it."""
        took, metrics = time.perf_counter() - self._asked, self._service.metrics
        if isinstance(event, Began):
            metrics.prompt_tokens.inc(event.prompt_tokens)
        elif isinstance(event, Written) and self._first:
            self._first = False
            metrics.first_text.observe(took)
        elif isinstance(event, Ended):
            metrics.completion_tokens.inc(event.completion_tokens)
            if event.reason != "cancelled":
                metrics.answer.observe(took)

    def cancel(self) -> None:
        """Write no more of it; nothing happens to one that has ended."""
        self._ticket.cancel()


async def unless(happens: Coroutine[Any, Any, object], work: Coroutine[Any, Any, Result], error: Exception) -> Result:
    """The result of some work; the error if something else happens before that, and the work has been cancelled."""
    working, other = asyncio.ensure_future(work), asyncio.ensure_future(happens)
    try:
        await asyncio.wait((working, other), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise error
        return working.result()
    finally:
        working.cancel()
        other.cancel()
        await asyncio.gather(working, other, return_exceptions=True)


def stopping() -> ApiError:
    """What a client is told whose answer ends with the server."""
    return ApiError(503, "the server is being stopped; ask again when it is back", code="stopping", retry=5)


@dataclass(frozen=True)
class Evidence:
    """What an answer about a video rests on, as clients get it."""

    memory: str | None = None
    moments: list[Moment] = field(default_factory=list)
    curve: dict[str, Any] | None = None

    @classmethod
    def of(cls, memory: str | None, mass: "Tensor | None", curve: bool) -> "Evidence":
        """The evidence that attention over time (T,) is; nothing at all without a memory."""
        if memory is None or mass is None:
            return cls()
        return cls(memory, find_moments(mass), curve_of(mass) if curve else None)

    def fields(self) -> dict[str, Any]:
        """What stands beside the text of an answer."""
        if self.memory is None:
            return {}
        shown = {"memory": self.memory, "moments": [moment_fields(m) for m in self.moments]}
        return shown if self.curve is None else shown | {"curve": self.curve}


def moment_fields(moment: Moment) -> dict[str, Any]:
    """A moment as clients get it: seconds, share of the attention, and the time as a player shows it."""
    return {"start": moment.start, "end": moment.end, "share": round(moment.share, 6), "label": str(moment)}


def curve_of(mass: "Tensor") -> dict[str, Any]:
    """Attention over time (T,) in at most CURVE_BINS stretches of equal length, the largest share in each."""
    seconds = len(mass)
    count = min(seconds, CURVE_BINS)
    edges = [seconds * n // count for n in range(count + 1)]
    bins = [round(float(mass[a:b].max()), 8) for a, b in pairwise(edges)]
    return {"seconds": seconds, "bins": bins}


def check_budget(text: str | None) -> None:
    """Raise InputError unless what a client gives as its budget is one."""
    if text is not None:
        as_budget(text)


def check_texts(conversation: Conversation, tokens: int) -> None:
    """Raise InputError if the texts of a conversation are far longer than so many tokens can be.

    How many tokens they are is found out on the engine's thread, where megabytes of text would hold up everyone.
    """
    said = (conversation.system or "", *(text for turn in conversation.history for text in turn), conversation.question)
    size = sum(len(text.encode()) for text in said)
    if size > BYTES_A_TOKEN * tokens:
        why = f"it has {size} bytes of text, and the decoder reads {tokens} tokens"
        raise InputError("question", why, "shorten it")


def check_memory_name(name: str, param: str) -> None:
    """Raise ApiError unless a memory can have the name that a client gives in `param`."""
    if any(unicodedata.category(letter) == "Cc" for letter in name):
        raise ApiError(400, f"{param}: it holds control characters; choose another name", param, "invalid_value")
    try:
        check_name(name)
    except MemoryFileError as error:
        raise ApiError(400, str(error), param, "invalid_value") from error


def is_awaited(status: "Status") -> bool:
    """Whether a question about a video waits: for its end or, where that is not in sight, for its first second."""
    return status.state in ("waiting", "watching") or (status.state == "following" and not status.frames)


async def watched(service: Service, name: str, wait: bool) -> AsyncIterator["Status"]:
    """Waits for a video as long as it is being watched: how far it is, about once a second.

    Raises:
        ApiError: nothing of it can be asked yet, or the server is being closed.
        HourLlavaError: what kept it from being watched.
    """
    pause, told = FIRST_LOOK, time.monotonic()
    while True:
        status = await run_sync(service.library.status, name)
        if status.state == "failed" and (wait or not status.frames):
            await run_sync(service.library.wait, name, 0)  # raises what it failed with
        if not (wait and is_awaited(status)):
            break
        if service.stopping.is_set():
            raise stopping()
        if time.monotonic() - told >= LONGEST_LOOK:
            told = time.monotonic()
            yield status
        await asyncio.sleep(pause)
        pause = min(LONGEST_LOOK, 1.5 * pause)
    if not status.frames:
        raise ApiError(503, f"{name}: no second of it has been watched yet; ask again", code="not_ready", retry=1)


async def ask(service: Service, conversation: Conversation, memory: str | None, wishes: Wishes) -> RunningAnswer:
    """Hand a conversation to the engine, about a memory or about none.

    Raises:
        BusyError: too many questions are waiting.
        InputError: the texts are longer than the decoder can read.
        HourLlavaError: an image cannot be fetched or seen; the memory cannot be read.
    """
    check_texts(conversation, service.model.config.text_config.max_position_embeddings)
    if memory is None:
        messages = await run_sync(load_pictures, conversation.messages, service.policy)
        return RunningAnswer(service, partial(prepare_pictures, service.model, messages), wishes)
    await run_sync(_bring_in, service.library, memory)
    options = conversation.options(wishes.budget)
    return RunningAnswer(service, partial(_prepared, service, memory, conversation.question, options), wishes)


def _bring_in(library: "Library", name: str) -> None:
    """Let a memory come from the disk before the engine's thread, which others wait for, is asked about it."""
    try:
        with library.use(name):
            pass
    except AdmissionError:
        return  # there may be room by the time it is its turn; if not, the engine says so


def _prepared(service: Service, name: str, question: str, options: Any) -> Prepared:
    with service.library.use(name) as memory:
        return prepare(service.model, memory, question, options)
