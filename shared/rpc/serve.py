"""Serving: one gRPC server per process, with health, status codes and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.shared.rpc.errors import BatonError, trailers
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)

PUBLIC_MESSAGE_BYTES = 4 << 20
INTERNAL_MESSAGE_BYTES = 16 << 20
LAUNCHER_PID_VARIABLE = "BATON_LAUNCHER_PID"

_PING_AFTER_MS = 20_000
_PATIENCE_MS = 10_000
"""For the answer to a ping."""

_SAME_SIGNAL_S = 1.0
"""When a launcher is killed, the kernel sends the signal once for each of its threads."""
_ORPHAN_END_S = 5

_CALL_TASK = "rpc_task"
"""As gRPC names the task of each call."""
_LAST_TURNS_S = 0.1

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def bare_host(host: str) -> str:
    """As sockets take it: `::1` for `[::1]` as well."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def join_address(host: str, port: int) -> str:
    """`HOST:PORT`, with brackets around what has colons itself; `host` may have them already."""
    host = bare_host(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", _PING_AFTER_MS),
        ("grpc.keepalive_timeout_ms", _PATIENCE_MS),
        # gRPC also pings to measure. While such a ping is out, only that ping's own limit, of one
        # minute, would show that nobody is there.
        ("grpc.http2.ping_timeout_ms", _PATIENCE_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        # A worker that comes back must be found at once.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]


def internal_channel(address: str) -> grpc.aio.Channel:
    """To another process of ours, whatever proxy the environment names: that is for the web."""
    options = [*channel_options(INTERNAL_MESSAGE_BYTES), ("grpc.enable_http_proxy", 0)]
    return grpc.aio.insecure_channel(address, options=options)


if TYPE_CHECKING:
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Context = grpc.aio.ServicerContext[Any, Any]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what servicers raise into status codes. What other errors say stays in the log."""

    def __init__(self) -> None:
        self._guarded: dict[str, _Handler] = {}
        """By method: a call shall not wait until its handler is made."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        method = handler_call_details.method
        if (guarded := self._guarded.get(method)) is not None:
            return guarded
        handler = await continuation(handler_call_details)
        # Health and reflection bring handlers of their own, which raise none of our errors.
        if handler is None or not method.startswith("/baton."):
            return handler
        field = "stream" if handler.request_streaming else "unary"
        field += "_stream" if handler.response_streaming else "_unary"
        guard = _guard_stream if handler.response_streaming else _guard_unary
        made = _with_behaviour(handler, field, guard(getattr(handler, field)))
        self._guarded[method] = made
        return made


def _with_behaviour(handler: _Handler, field: str, behaviour: object) -> _Handler:
    make = getattr(grpc, f"{field}_rpc_method_handler")
    made: _Handler = make(
        behaviour,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return made


def _guard_unary(behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: _Context) -> Any:
        try:
            return await behaviour(request, context)
        except Exception as error:
            await abort(context, error)

    return guarded


def _guard_stream(
    behaviour: Callable[..., AsyncGenerator[Any, None]],
) -> Callable[..., AsyncIterator[Any]]:
    async def guarded(request: Any, context: _Context) -> AsyncIterator[Any]:
        try:
            async with aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:
            await abort(context, error)

    return guarded


async def abort(context: _Context, error: Exception) -> None:
    """Ends the RPC with the error's status. The details of an internal error stay in the log."""
    if isinstance(error, BatonError):
        await context.abort(error.code, error.message, trailing_metadata=trailers(error))
    if isinstance(error, grpc.aio.AbortError):
        raise error
    log_event(logger, logging.ERROR, "handler failed", exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error")


class Endpoint:
    """A listening server; servicers are added to `server` before it starts."""

    def __init__(
        self,
        *,
        max_message_bytes: int,
        with_reflection: bool = False,
        reuse_port: bool = False,
        connection_age_s: float | None = None,
    ) -> None:
        """`reuse_port`: share the port with other processes that do. `connection_age_s`: a client
        is told to connect anew after that long, 10 % more or less; its calls go on."""
        options = [
            *channel_options(max_message_bytes),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ("grpc.so_reuseport", int(reuse_port)),
        ]
        if connection_age_s is not None:
            options.append(("grpc.max_connection_age_ms", int(connection_age_s * 1e3)))
        self.server = grpc.aio.server(
            interceptors=[ErrorInterceptor()],
            options=options,
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        self._with_reflection = with_reflection
        self._services: Sequence[str] = ()
        self.address = ""

    async def start(self, host: str, port: int, services: Sequence[str]) -> None:
        """Listens, not yet healthy. `port` 0 picks one. Raises OSError when it can't."""
        self._services = services
        if self._with_reflection:
            names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self.server)
        try:
            bound = self.server.add_insecure_port(join_address(host, port))
        except RuntimeError as error:
            raise OSError(f"cannot listen on {join_address(host, port)}: {error}") from error
        self.address = join_address(host, bound)
        await self._health.set("", _SERVING)
        for service in services:
            await self._health.set(service, _NOT_SERVING)
        await self.server.start()

    async def set_ready(self, *, is_ready: bool) -> None:
        """Health of the named services; "" tells only that the process lives."""
        for service in self._services:
            await self._health.set(service, _SERVING if is_ready else _NOT_SERVING)

    def stop_listening(self) -> None:
        """New connections go to the other processes on the port; calls on those that exist are
        served.

        gRPC itself can't: when it stops, it cancels calls that are just arriving.
        """
        for listener in self._sockets():
            # Several descriptors may stand for one socket, which is shut by then.
            with listener, contextlib.suppress(OSError):
                if _is_listening(listener):
                    listener.shutdown(socket.SHUT_RDWR)

    def has_connections(self) -> bool:
        found = self._sockets()
        is_any = not all(map(_is_listening, found))
        for one in found:
            one.close()
        return is_any

    def _sockets(self) -> list[socket.socket]:
        """Duplicates of this process's sockets on the port, which gRPC does not hand out."""
        port = int(self.address.rpartition(":")[2])
        found = []
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                descriptor = os.dup(int(entry.name))
                try:
                    one = socket.socket(fileno=descriptor)
                except OSError:
                    os.close(descriptor)
                    continue
                is_tcp = one.family in (socket.AF_INET, socket.AF_INET6)
                if is_tcp and one.getsockname()[1] == port:
                    found.append(one)
                else:
                    one.close()
        return found

    async def stop(self, grace_s: float) -> None:
        """Listens no more and tells clients to go elsewhere; ends what runs after `grace_s`."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)
        # Calls that were ended just now take a few more turns of the loop. If it ends first, gRPC
        # prints a traceback for each.
        calls = [task for task in asyncio.all_tasks() if task.get_name() == _CALL_TASK]
        if calls:
            await asyncio.wait(calls, timeout=_LAST_TURNS_S)


def _is_listening(one: socket.socket) -> bool:
    return bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def stop_event() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; one more, later, ends the process at once."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    set_at = 0.0

    def limit_orphan() -> None:
        if is_orphaned():
            # Nobody else would kill a process that does not end.
            signal.alarm(_ORPHAN_END_S)

    def on_signal() -> None:
        nonlocal set_at
        if not event.is_set():
            event.set()
            set_at = loop.time()
            loop.call_later(_SAME_SIGNAL_S, limit_orphan)
        elif loop.time() - set_at > _SAME_SIGNAL_S:
            os._exit(130)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return event


def is_orphaned() -> bool:
    """Whether the launcher that started this process is gone. Then nobody waits for a drain."""
    launcher = os.environ.get(LAUNCHER_PID_VARIABLE)
    return launcher is not None and os.getppid() != int(launcher)
