"""What a connection may cost: bounds on its headers, its silence and its slowness.

uvicorn on h11 bounds the head of a request in bytes and stops reading while a body waits; this adds
bounds in time, a bound on connections, and errors in OpenAI's shape. A body's own bounds are in
body.py.
"""

from __future__ import annotations

import asyncio
import http
import logging
import resource
from collections.abc import Callable
from typing import Any

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from baton.services.gateway.openai.errors import HttpError
from baton.shared.telemetry import log_event

MAX_HEAD_BYTES = 32 << 10
HEAD_LIMIT_S = 10.0
"""From the first byte of a request, or the start of the connection, to the end of its head."""
KEEP_ALIVE_S = 65.0
"""Longer than the pools of usual clients and proxies keep a connection, so that they close
first."""
SEND_LIMIT_S = 30.0
"""A client that reads so slowly that the write buffer stays full for that long is cut off."""
LINGER_S = 1.0
"""That a refused connection stays open so that its client can read why."""

OnRefused = Callable[[int], None]
"""Told the status of each answer that the application did not give."""

_IS_REFUSED = "is_refused"

logger = logging.getLogger(__name__)


def is_refused(scope: Scope) -> bool:
    """Whether this HTTP request's connection has answered, and counted that, while a handler was
    reading its body."""
    return _IS_REFUSED in scope["state"]


def max_connections() -> int:
    """Leaves half of the file descriptors to everything else."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(4096, soft // 2)


class GuardedProtocol(H11Protocol):
    limit_connections = 4096

    def __init__(self, *args: Any, on_refused: OnRefused, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._on_refused = on_refused
        self._is_refused = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limit_connections:
            self._refuse(HttpError(503, "too many connections", code="too_many_connections"))
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self._is_between_requests() and self._head_timer is None:
            self._await_head()
        super().data_received(data)
        if not self._is_between_requests():
            self._stop_head_timer()

    def shutdown(self) -> None:
        """Of the server, after the drain. Nothing is waited for that a client may leave undone: who
        has not sent a whole request is refused, who does not take an answer is cut off."""
        if self.conn.their_state is h11.SEND_BODY:
            self._refuse(HttpError(503, "the gateway is shutting down", code="draining"))
            return
        super().shutdown()
        self.loop.call_later(LINGER_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_send_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._send_timer is None:
            self._send_timer = self.loop.call_later(SEND_LIMIT_S, self._cut_off)

    def resume_writing(self) -> None:
        self._stop_send_timer()
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_between_requests():
            self._stop_head_timer()

    def send_400_response(self, msg: str) -> None:
        """Called when a request is not HTTP, or its head is too long."""
        buffered, _ = self.conn.trailing_data
        if len(buffered) > MAX_HEAD_BYTES:
            message = f"the headers are too large; limit: {MAX_HEAD_BYTES} bytes"
            self._refuse(HttpError(431, message, code="headers_too_large"))
        else:
            self._refuse(HttpError(400, "malformed request", code="invalid_http"))

    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_LIMIT_S, self._on_head_late)

    def _on_head_late(self) -> None:
        message = f"the headers did not arrive within {HEAD_LIMIT_S:g} s"
        self._refuse(HttpError(408, message, code="timeout"))

    def _refuse(self, error: HttpError) -> None:
        """Answers and closes. When an answer has begun, or nobody would read one, it only
        closes."""
        self._stop_head_timer()
        if not self.transport.is_closing():
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                body = error.body()
                phrase = http.HTTPStatus(error.status).phrase
                head = f"HTTP/1.1 {error.status} {phrase}\r\ncontent-type: application/json\r\n"
                head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
                self.transport.write(head.encode() + body)
                self._on_refused(error.status)
                # What still comes is read and dropped: to close before would reset the connection,
                # and the answer might be lost with it.
                self._is_refused = True
                self.transport.write_eof()
                if self.cycle is not None:
                    # Its handler reads no further, and nothing that it says is sent.
                    self.cycle.scope["state"][_IS_REFUSED] = True
                    self.cycle.disconnected = True
                    self.cycle.message_event.set()
            else:
                self.transport.close()
            self.loop.call_later(LINGER_S, self.transport.abort)

    def _cut_off(self) -> None:
        log_event(logger, logging.INFO, "slow reader cut off", limit_s=SEND_LIMIT_S)
        self.transport.abort()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
