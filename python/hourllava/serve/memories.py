# SPDX-License-Identifier: Apache-2.0
"""The routes of `/v1/memories`: videos come in, are followed, looked at, stopped and deleted."""

import mimetypes
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from anyio import CancelScope, CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response
from PIL import Image

from hourllava.video import stills

from .answering import Service, check_memory_name, stopping, unless
from .files import too_large
from .problems import ApiError
from .schemas import MemoryRequest

if TYPE_CHECKING:
    from .jobs import Status

PIECE = 1 << 20  # bytes of an upload that are written at once
KEPT = "private, max-age=600"  # of pictures: a page shows the same ones again


def shown(status: "Status") -> dict[str, Any]:
    """A video's status as clients get it."""
    return {"object": "memory", **asdict(status)}


def memory_routes(service: Service) -> APIRouter:
    """The routes of one server."""
    routes = APIRouter(prefix="/v1/memories", tags=["memories"])

    async def status_of(name: str) -> dict[str, Any]:
        return shown(await run_sync(service.library.status, name))

    @routes.get("")
    async def list_memories() -> dict[str, Any]:
        """Every video that the server knows, and how far it has been watched."""
        return {"object": "list", "data": [shown(s) for s in await run_sync(service.library.statuses)]}

    @routes.post("", status_code=202)
    async def watch(asked: MemoryRequest) -> dict[str, Any]:
        """Begin to watch a video, or to follow a stream."""
        if asked.name is not None:
            check_memory_name(asked.name, "name")
        if not asked.follow:
            return await status_of(await run_sync(service.library.ensure, asked.url, asked.name))
        if asked.name is None:
            raise ApiError(400, "name: a stream has no name of its own; give it one", "name", "missing_parameter")
        return await status_of(await run_sync(service.library.follow, asked.url, asked.name, asked.idle))

    @routes.get("/{name}")
    async def look_up(name: str) -> dict[str, Any]:
        """One video."""
        return await status_of(name)

    @routes.put("/{name}", status_code=202)
    async def upload(name: str, request: Request) -> dict[str, Any]:
        """Send a video's file as the body, and begin to watch it."""
        check_memory_name(name, "name")
        size, most = request.headers.get("content-length", ""), service.policy.max_bytes
        if size.isdecimal() and int(size) > most:
            raise too_large(name, int(size), most)  # before it is sent: curl and others wait for a word
        await unless(service.stopping.wait(), _receive(service, name, request), stopping())
        return await status_of(name)

    @routes.delete("/{name}")
    async def delete(name: str) -> dict[str, Any]:
        """Forget a video, and what is known of it."""
        await run_sync(service.library.delete, name)
        return {"id": name, "object": "memory", "deleted": True}

    @routes.post("/{name}/stop")
    async def stop(name: str) -> dict[str, Any]:
        """Watch no further; what has been watched stays."""
        await run_sync(service.library.stop, name)
        return await status_of(name)

    _add_pictures(routes, service)
    return routes


def _add_pictures(routes: APIRouter, service: Service) -> None:
    looking = CapacityLimiter(2)  # pictures take a core each

    @routes.get("/{name}/picture", response_class=Response)
    async def picture(
        name: str, second: Annotated[int, Query(ge=0)], width: Annotated[int, Query(ge=16, le=1920)] = 320
    ) -> Response:
        """One second of a video as JPEG."""
        status = await run_sync(service.library.status, name)
        film = await _film(service, name)
        if second >= status.frames:
            raise ApiError(404, f"{name} has {status.frames} seconds and no second {second}", "second", "not_found")
        data = await run_sync(_still, film, second, width, limiter=looking)
        return Response(data, media_type="image/jpeg", headers={"cache-control": KEPT})

    @routes.head("/{name}/video", include_in_schema=False)
    @routes.get("/{name}/video", response_class=FileResponse)
    async def video(name: str) -> FileResponse:
        """The video's file, in whole or in ranges, as players ask for it."""
        film = await _film(service, name)
        kind = mimetypes.guess_type(film.name)[0] or ""
        # A file may be anything that somebody has sent: never a page of this server.
        return FileResponse(film, media_type=kind if kind.startswith("video/") else "application/octet-stream")


async def _film(service: Service, name: str) -> Path:
    film = await run_sync(service.library.film, name)
    if film is None:
        raise ApiError(404, f"{name}: there is no video file of it here", code="not_found")
    return film


def _still(film: Path, second: int, width: int) -> bytes:
    """A second of a film as JPEG, at most so many columns wide."""
    (picture,) = stills(film, [second], (4 * width, width))
    data = BytesIO()
    Image.fromarray(picture).save(data, "JPEG", quality=85)
    return data.getvalue()


async def _receive(service: Service, name: str, request: Request) -> None:
    """Take in a body as the video file of a memory; nothing is left of one that does not come whole."""
    upload = await run_sync(service.library.upload, name)
    pieces, size = list[bytes](), 0
    try:
        async for piece in request.stream():
            pieces.append(piece)
            size += len(piece)
            if size >= PIECE:
                await run_sync(upload.write, b"".join(pieces))
                pieces, size = [], 0
        if pieces:
            await run_sync(upload.write, b"".join(pieces))
        await run_sync(upload.commit)
    except BaseException:
        with CancelScope(shield=True):  # it may be a cancellation that brought us here
            await run_sync(upload.abort)
        raise
