"""Serves the HTTP application from the gateway's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from functools import partial
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from baton.services.gateway.openai.guard import (
    KEEP_ALIVE_S,
    LINGER_S,
    MAX_HEAD_BYTES,
    GuardedProtocol,
    OnRefused,
    max_connections,
)
from baton.shared.rpc.serve import bare_host, join_address

_BACKLOG = 1024
_PROBE_AFTER_S = 15
_PROBE_EVERY_S = 5
_NUM_PROBES = 3
_UNACKNOWLEDGED_MS = 30_000
"""A peer that vanished is noticed by probes while the connection is idle, else by this limit."""


class HttpEndpoint:
    def __init__(self, app: ASGIApp, *, on_refused: OnRefused) -> None:
        """`on_refused` gets the status of each connection's answer that is not `app`'s."""
        # uvicorn would write a line for every bad request that a client likes to send.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        self._new_protocol = partial(GuardedProtocol, on_refused=on_refused)
        self._config = uvicorn.Config(
            app,
            # uvicorn does no more with it than call it.
            http=cast(type[GuardedProtocol], self._new_protocol),
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=int(KEEP_ALIVE_S),
            # By then connections have closed by themselves: else uvicorn would log a traceback of
            # each request that it cancels.
            timeout_graceful_shutdown=int(LINGER_S) + 1,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
        GuardedProtocol.limit_connections = max_connections()
        self._server = _Server(self._config)
        self._task: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None
        self.address = ""

    async def start(self, host: str, port: int, *, reuse_port: bool = False) -> None:
        """Listens. `port` 0 picks one. Raises OSError, naming the flag, when it can't."""
        try:
            bound = _bind(host, port, reuse_port=reuse_port)
        except OSError as error:
            problem = error.strerror or error
            where = join_address(host, port)
            raise OSError(f"cannot listen on {where} (--http-port): {problem}") from None
        self.address = join_address(host, bound.getsockname()[1])
        # Its queue of connections must outlive the closing of the server: see `stop_accepting`.
        self._listener = bound.dup()
        self._task = asyncio.create_task(self._server.serve(sockets=[bound]))
        await self._server.is_listening.wait()

    def close_after_answers(self) -> None:
        """Every answer that starts from now on says that it is its connection's last.

        Those that have started go on, and so do their connections: a client that was not told
        would send its next request into the closing one.
        """
        close = (b"connection", b"close")
        self._config.encoded_headers.append(close)
        self._server.server_state.default_headers.append(close)

    async def stop_accepting(self) -> None:
        """New connections go to the port's other processes; those in the queue are still taken."""
        for server in self._server.servers:
            server.close()
        listener, self._listener = self._listener, None
        if listener is None:
            return
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        with listener:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connection.setblocking(False)
                await loop.connect_accepted_socket(self._new_connection, connection)

    async def stop(self) -> None:
        """Ends what is left."""
        if self._listener is not None:
            self._listener.close()
        self._server.should_exit = True
        if self._task is not None:
            await self._task

    def _new_connection(self) -> GuardedProtocol:
        return self._new_protocol(
            config=self._config,
            server_state=self._server.server_state,
            app_state={},
            _loop=asyncio.get_running_loop(),
        )


class _Server(uvicorn.Server):
    """Signals are the gateway's."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_listening.set()


def _bind(host: str, port: int, *, reuse_port: bool) -> socket.socket:
    [(family, kind, protocol, _, where), *_] = socket.getaddrinfo(
        bare_host(host), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Connections inherit these.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER_S)
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_EVERY_S)
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _NUM_PROBES)
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)
        bound.bind(where)
        bound.listen(_BACKLOG)
    except OSError:
        bound.close()
        raise
    return bound
