# SPDX-License-Identifier: Apache-2.0
"""What stands around every route: who may ask, how large a body may be, and that each response can be traced."""

import asyncio
import hmac
import ipaddress
import logging
import uuid
from http.cookies import CookieError, SimpleCookie
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answering import Service, stopping
from .problems import ApiError, hidden_problem

_log = logging.getLogger(__name__)
COOKIE = "hourllava_key"
MAX_BODY = 64 << 20  # bytes of a body that is read into memory; a video that is sent as a file is not
TOO_LONG = f"the body is longer than {MAX_BODY >> 20} MiB; send a video as a file, with PUT /v1/memories/NAME"
_SAFE = {
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
}


class Guard:
    """Lets in who may ask, gives each response an `x-request-id`, counts it, and answers for bugs.

    Requests of web pages are taken from the server's own page only (Origin), and where only this machine is listened
    to and no key is asked for, only by the machine's own names (Host): or any page in a browser here could ask.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI applications are called."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        call = _Call(scope, receive, send)
        try:
            refused = self._refusal(scope)
            if refused is not None:
                await call.refuse(refused)
                return
            await self._app(scope, call.receive, call.send)
        except ClientDisconnect:
            pass  # nobody is left to be told
        except asyncio.CancelledError:
            if not self._service.stopping.is_set():
                raise
            await call.refuse(stopping())  # to who was still sending, or has not read, when all time was up
        except Exception:
            _log.exception("request %s: %s %s failed", call.id, scope.get("method", "WS"), scope["path"])
            await call.refuse(hidden_problem(call.id))
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._service.metrics.requests.labels(route, str(call.status)).inc()

    def _refusal(self, scope: Scope) -> ApiError | None:
        """Why somebody may not ask, if so."""
        headers, service = Headers(scope=scope), self._service
        host = headers.get("host", "")
        if service.local and service.key is None and not _is_loopback(host):
            why = f"the server is asked as {host!r}, but listens to this machine only; ask it as localhost"
            return ApiError(403, why, code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            why = f"a page of {origin!r} may not use a server that is asked as {host!r}; a proxy has to pass Host on"
            return ApiError(403, why, code="wrong_origin")
        path = scope["path"]
        if service.key is not None and (path.startswith("/v1/") or path in ("/v1", "/metrics")):
            given = _given_key(headers)
            if given is None:
                return ApiError(401, "give the key of this server as 'Authorization: Bearer KEY'", code="missing_key")
            if not hmac.compare_digest(given.encode(errors="replace"), service.key.encode()):
                return ApiError(401, "that is not the key of this server", code="invalid_api_key")
        return None


def _is_loopback(host: str) -> bool:
    """Whether a Host header names this machine as only it can be meant."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _given_key(headers: Headers) -> str | None:
    kind, _, key = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and key.strip():
        return key.strip()
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return unquote(cookie.value) if cookie is not None else None


class _Call:
    """One request: what is sent for it is marked, and what comes is counted."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.id, self.status = f"req-{uuid.uuid4().hex}", 499  # unless a response begins, the client has gone
        self._scope, self._receive, self._send = scope, receive, send
        self._began, self._got = False, 0
        self._limited = scope["type"] == "http" and scope["method"] != "PUT"

    async def receive(self) -> Message:
        message = await self._receive()
        if self._limited and message["type"] == "http.request":
            self._got += len(message.get("body", b""))
            if self._got > MAX_BODY:
                raise HTTPException(413, TOO_LONG)  # FastAPI lets no other kind through while it reads a body
        return message

    async def send(self, message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.http.response.start"):
            self._began, self.status = True, message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.id
            for name, value in _SAFE.items():
                headers.setdefault(name, value)
        elif message["type"] == "websocket.accept":
            self._began, self.status = True, 101
        await self._send(message)

    async def refuse(self, problem: ApiError) -> None:
        """Send a problem as the response, if none has begun; a websocket that has, ends."""
        if self._scope["type"] == "websocket" and self._began:
            await self._send({"type": "websocket.close", "code": 1011})
        elif not self._began:
            await problem.response()(self._scope, self._receive, self.send)
