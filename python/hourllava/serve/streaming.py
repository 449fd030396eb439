# SPDX-License-Identifier: Apache-2.0
"""Answers as OpenAI's clients read them: in one piece, or as a stream of server-sent events."""

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .answering import Began, Ended, Evidence, RunningAnswer, Service, Written, ask, watched
from .chat import Conversation
from .problems import hidden_problem, problem_of
from .schemas import ChatRequest

_log = logging.getLogger(__name__)


class ChatAnswer:
    """One chat completion: the question is asked, and its answer is given out whole or in chunks.

    Args:
        memory: name of the video's memory, if the conversation is about one.
    """

    def __init__(self, service: Service, request: ChatRequest, conversation: Conversation, memory: str | None) -> None:
        self._service, self._request = service, request
        self._conversation, self._memory = conversation, memory
        self._running: RunningAnswer | None = None
        self._prompt_tokens = 0
        self._ended: Ended | None = None
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.model_name}

    async def begin(self) -> Evidence:
        """Ask, and wait until the answer begins.

        Raises:
            ApiError, HourLlavaError: it cannot be asked.
        """
        self._running = await ask(self._service, self._conversation, self._memory, self._request)
        began = await self._running.next()
        assert isinstance(began, Began)
        self._prompt_tokens = began.prompt_tokens
        return Evidence.of(self._memory, began.mass, self._request.evidence)

    def cancel(self) -> None:
        """Write no more of it."""
        if self._running is not None:
            self._running.cancel()

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece.

        Raises:
            ApiError, HourLlavaError: it cannot be given.
        """
        if self._memory is not None:
            async for _ in watched(self._service, self._memory, self._request.wait):
                pass
        evidence = await self.begin()
        text = "".join([text async for text in self._texts()])
        message = {"role": "assistant", "content": text, "refusal": None, **evidence.fields()}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._reason()}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": self._usage()}

    async def chunks(self, evidence: Evidence | None = None) -> AsyncIterator[str]:
        """The answer as server-sent events; problems come as an event, too.

        Args:
            evidence: what `begin` gave, if it was called.
        """
        try:
            if evidence is None:
                assert self._memory is not None
                async for status in watched(self._service, self._memory, self._request.wait):
                    whole = "" if status.expected is None else f" of {status.expected}"
                    yield f": {status.state} {status.frames}{whole} s\n\n"
                evidence = await self.begin()
            yield self._chunk({"role": "assistant", "content": "", **evidence.fields()})
            async for text in self._texts():
                yield self._chunk({"content": text})
            yield self._chunk({}, self._reason())
            if self._request.usage_in_stream:
                yield _event(self._body([]) | {"usage": self._usage()})
        except Exception as error:
            problem = problem_of(error)
            if problem is None:
                problem = hidden_problem(str(self._head["id"]))
                _log.exception("answer %s failed", self._head["id"])
            yield _event(problem.body())
        yield "data: [DONE]\n\n"

    async def _texts(self) -> AsyncIterator[str]:
        """What is written, to the end."""
        assert self._running is not None
        while self._ended is None:
            event = await self._running.next()
            if isinstance(event, Written):
                yield event.text
            elif isinstance(event, Ended):
                self._ended = event

    def _reason(self) -> str:
        assert self._ended is not None
        return self._ended.reason

    def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self._request.usage_in_stream else {}
        return _event(self._body([choice]) | usage)

    def _usage(self) -> dict[str, int]:
        assert self._ended is not None
        asked, answered = self._prompt_tokens, self._ended.completion_tokens
        return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class EventStream(StreamingResponse):
    """A chat completion as server-sent events, whose answer is cancelled when its reader goes."""

    media_type = "text/event-stream"

    def __init__(self, answer: ChatAnswer, evidence: Evidence | None = None) -> None:
        super().__init__(answer.chunks(evidence), headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI applications are called."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()
