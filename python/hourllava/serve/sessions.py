# SPDX-License-Identifier: Apache-2.0
"""`WS /v1/video/chat/stream`: a client sends frames, one a second of its video, and asks about them meanwhile."""

import asyncio
import contextlib
import json
import logging
import uuid
from typing import TYPE_CHECKING, Annotated, Any, Literal

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from pydantic import Field, TypeAdapter, ValidationError

from hourllava.model import find_moments

from .answering import Began, Ended, Service, Written, ask, check_budget, check_memory_name, moment_fields, watched
from .chat import Conversation
from .pictures import decode_frame
from .problems import ApiError, hidden_problem, problem_of
from .schemas import Body, Name, Text, Wishes

if TYPE_CHECKING:
    from .jobs import LiveMemory

_log = logging.getLogger(__name__)
MAX_QUERIES = 8  # that may wait in one session


class SessionConfig(Wishes):
    type: Literal["session.config"]
    memory: Name | None = None
    model: Text | None = None


class VideoFrame(Body):
    type: Literal["video.frame"]
    data: str


class VideoQuery(Body):
    type: Literal["video.query"]
    text: Text
    history: tuple[tuple[Name, Text], ...] = ()  # earlier questions and their answers


class VideoDone(Body):
    type: Literal["video.done"]


ClientEvent = Annotated[SessionConfig | VideoFrame | VideoQuery | VideoDone, Field(discriminator="type")]
_EVENTS: TypeAdapter[SessionConfig | VideoFrame | VideoQuery | VideoDone] = TypeAdapter(ClientEvent)


def session_routes(service: Service) -> APIRouter:
    """The route of one server."""
    routes = APIRouter()

    @routes.websocket("/v1/video/chat/stream")
    async def stream(socket: WebSocket) -> None:
        await socket.accept()
        await _Session(service, socket).run()

    return routes


class _Session:
    """One connection: a memory, the frames that are appended to it, and questions that are answered in turn."""

    def __init__(self, service: Service, socket: WebSocket) -> None:
        self._service, self._socket = service, socket
        self._config: SessionConfig | None = None
        self._memory = ""
        self._live: LiveMemory | None = None
        self._queries: asyncio.Queue[VideoQuery | None] = asyncio.Queue()
        self._done = False

    async def run(self) -> None:
        """Until the client has gone, or has said that it is done and has got its answers."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._answer)
                await self._listen()
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self._end_live()

    async def _listen(self) -> None:
        while (message := await self._socket.receive())["type"] != "websocket.disconnect":
            try:
                await self._take(message.get("text") or "")
            except Exception as error:
                await self._tell_problem(error)

    async def _take(self, text: str) -> None:
        """Do what an event of the client asks for."""
        try:
            event = _EVENTS.validate_json(text)
        except ValidationError as error:
            errors = [each | {"loc": ("body", *each["loc"])} for each in error.errors()]
            body = {} if errors[0]["type"] == "json_invalid" else json.loads(text)
            raise RequestValidationError(errors, body=body) from error
        if self._done:
            raise ApiError(400, "the session is done; open another one")
        if isinstance(event, SessionConfig):
            await self._open(event)
            return
        if self._config is None:
            raise ApiError(400, "there is no session yet; send session.config first")
        if isinstance(event, VideoFrame):
            await self._append(event)
        elif isinstance(event, VideoDone):
            self._done = True
            await self._end_live()
            self._queries.put_nowait(None)
        elif self._queries.qsize() >= MAX_QUERIES:
            raise ApiError(429, f"{MAX_QUERIES} questions of this session are waiting; ask again in a moment")
        else:
            self._queries.put_nowait(event)

    async def _open(self, config: SessionConfig) -> None:
        service, library = self._service, self._service.library
        if self._config is not None:
            raise ApiError(400, "the session has its config; open another one")
        check_model(service, config.model)
        check_budget(config.budget)
        if config.memory is not None:
            check_memory_name(config.memory, "memory")
        name = config.memory or f"session-{uuid.uuid4().hex[:12]}"
        known = await run_sync(library.statuses) if config.memory else []
        if not any(status.name == name for status in known):
            self._live = await run_sync(library.live, name)
        self._config, self._memory = config, name
        await self._send("session.created", memory=name)

    async def _append(self, event: VideoFrame) -> None:
        service = self._service
        frames = await run_sync(decode_frame, event.data)
        if self._live is None:
            self._live = await run_sync(service.library.live, self._memory)
        count = await run_sync(self._live.append, frames)
        await self._send("video.appended", frames=count)

    async def _answer(self) -> None:
        """Answer the questions of the session one after the other."""
        while (query := await self._queries.get()) is not None:
            try:
                await self._answer_one(query)
            except Exception as error:
                await self._tell_problem(error)
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await self._socket.close()

    async def _answer_one(self, query: VideoQuery) -> None:
        assert self._config is not None
        async for _ in watched(self._service, self._memory, wait=False):
            pass
        conversation = Conversation(query.text, query.history)
        running = await ask(self._service, conversation, self._memory, self._config)
        try:
            written, moments = list[str](), list[dict[str, Any]]()
            while not isinstance(event := await running.next(), Ended):
                if isinstance(event, Began):
                    moments = [] if event.mass is None else [moment_fields(m) for m in find_moments(event.mass)]
                    await self._send("response.start")
                elif isinstance(event, Written):
                    written.append(event.text)
                    await self._send("response.text.delta", delta=event.text)
            await self._send("response.text.done", text="".join(written), moments=moments)
        finally:
            running.cancel()

    async def _end_live(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            await run_sync(live.close)

    async def _tell_problem(self, error: Exception) -> None:
        problem = problem_of(error)
        if problem is None:
            problem = hidden_problem(f"session-{uuid.uuid4().hex}")
            _log.exception("%s", problem.message)
        await self._send("error", message=problem.message)

    async def _send(self, kind: str, **fields: Any) -> None:
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # it has gone, as `_listen` will hear
            await self._socket.send_json({"type": kind, **fields})


def check_model(service: Service, name: str | None) -> None:
    """Raise ApiError unless a client means the model that is served."""
    if name not in (None, service.model_name):
        why = f"the model {name!r} is not served here; ask for {service.model_name!r}, or leave it out"
        raise ApiError(404, why, "model", "model_not_found")
