# SPDX-License-Identifier: Apache-2.0
"""Runs the application until it is told to stop, and then lets answers come to their end."""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from .answering import Service
from .app import create_app

GRACE = 5.0  # seconds that running answers have to end by themselves, once the server is told to stop
FAREWELL = 5  # further seconds for telling their clients that they did not


class Server(uvicorn.Server):
    """A server of one process, which ends with the exit code of the program and not with that of the signal.

    Args:
        service: what is served; its engine and library are closed in the end.
        ready: called when connections are taken.
    """

    def __init__(self, service: Service, ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            create_app(service),
            http="h11",
            ws="websockets-sansio",
            loop="asyncio",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=int(GRACE) + FAREWELL,
        )
        super().__init__(config)
        self._service, self._ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take connections, and say so."""
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more questions, give running answers some time, end those that need more, and close everything."""
        self._service.stopping.set()
        loop = asyncio.get_running_loop()
        closing = loop.call_later(GRACE, lambda: loop.run_in_executor(None, self._service.engine.close))
        try:
            await super().shutdown(sockets)
        finally:
            closing.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM stop the server; a second SIGINT does so at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
