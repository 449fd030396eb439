# SPDX-License-Identifier: Apache-2.0
"""The HTTP application: OpenAI's chat completions about videos, their memories, a page, and what operators need."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from anyio.to_thread import run_sync
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from hourllava.errors import HourLlavaError

from .answering import Service, check_budget, check_memory_name, is_awaited, stopping, unless, watched
from .chat import read_conversation
from .guard import Guard
from .memories import memory_routes
from .problems import ApiError, problem_of
from .schemas import ChatRequest
from .sessions import check_model, session_routes
from .streaming import ChatAnswer, EventStream

PAGE = Path(__file__).parent / "page"
# The page fetches nothing from elsewhere, and no other page may frame it.
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; style-src 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)


def create_app(service: Service) -> FastAPI:
    """The application of one server; when it ends, so do the engine and the library."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.stopping.set()
        await run_sync(service.engine.close)
        await run_sync(service.library.close)

    app = FastAPI(
        title="Hour-LLaVA",
        description="Questions about hour-long videos.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere, which would run beside the key
        redoc_url=None,
    )
    app.add_middleware(Guard, service=service)
    for kind in (ApiError, RequestValidationError, HTTPException, HourLlavaError):
        app.add_exception_handler(kind, _tell)
    app.include_router(memory_routes(service))
    app.include_router(session_routes(service))
    _add_chat(app, service)
    _add_models(app, service)
    _add_operation(app, service)
    _add_page(app)
    return app


async def _tell(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error.__cause__, ClientDisconnect):  # which FastAPI takes for a body that cannot be read
        raise error.__cause__
    problem = problem_of(error)
    assert problem is not None
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        problem.message = f"{request.method} {request.url.path} is not served here; GET /openapi.json lists what is"
    response = problem.response()
    response.headers.update(getattr(error, "headers", None) or {})
    return response


def _add_chat(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", tags=["chat"])
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation, as OpenAI's API does; a part of type `video_url` is its video."""
        check_model(service, asked.model)
        check_budget(asked.budget)
        if service.stopping.is_set():
            raise stopping()
        conversation, memory = read_conversation(asked), None
        if conversation.video is not None:
            video = conversation.video
            if video.name is not None:
                check_memory_name(video.name, "uuid")
            memory = await run_sync(service.library.ensure, video.source, video.name)
        answer = ChatAnswer(service, asked, conversation, memory)
        try:
            if not asked.stream:
                return await unless(_disconnected(request), _as_json(answer), ClientDisconnect())
            if memory is not None and not await _can_be_asked(service, memory, asked.wait):
                return EventStream(answer)  # which begins with how far it is
            return await unless(_disconnected(request), _as_stream(answer), ClientDisconnect())
        except BaseException:
            answer.cancel()
            raise


async def _as_json(answer: ChatAnswer) -> Response:
    return JSONResponse(await answer.whole())


async def _as_stream(answer: ChatAnswer) -> Response:
    return EventStream(answer, await answer.begin())


async def _can_be_asked(service: Service, memory: str, wait: bool) -> bool:
    """Whether there is nothing to wait for.

    Raises:
        ApiError, HourLlavaError: and never will be.
    """
    if wait and is_awaited(await run_sync(service.library.status, memory)):
        return False
    async for _ in watched(service, memory, wait=False):
        pass
    return True


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_models(app: FastAPI, service: Service) -> None:
    model = {"id": service.model_name, "object": "model", "created": service.started, "owned_by": "hourllava"}

    @app.get("/v1/models", tags=["models"])
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", tags=["models"])
    async def one_model(name: str) -> dict[str, Any]:
        """The same, by its name."""
        check_model(service, name)
        return model


def _add_operation(app: FastAPI, service: Service) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["operation"])
    async def health() -> dict[str, str]:
        """Whether questions are taken."""
        if service.stopping.is_set():
            raise stopping()
        return {"status": "ok"}

    @app.get("/metrics", tags=["operation"])
    async def metrics() -> Response:
        """Counters and gauges for Prometheus."""
        return Response(await run_sync(service.metrics.text), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI) -> None:
    def serve(route: str, file: str, kind: str) -> None:
        @app.api_route(route, methods=["GET", "HEAD"], include_in_schema=False)
        async def page() -> FileResponse:
            headers = {"content-security-policy": _POLICY, "cache-control": "no-cache"}
            return FileResponse(PAGE / file, media_type=kind, headers=headers)

    serve("/", "index.html", "text/html")
    serve("/page.css", "page.css", "text/css")
    serve("/page.js", "page.js", "text/javascript")
