"""Looks up the server's name so that nobody has to wait for it.

`getaddrinfo` takes as long as it likes, ten seconds where no name server answers, and cannot be
cancelled. In the event loop's own threads the look-ups that were given up pile up, hold up those
that would succeed, and the process waits for them in the end. Here a few run at a time, on threads
that end with the process; whatever one of them finds is for all who ask.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from redis.asyncio import Connection, SSLConnection

_FRESH_S = 5.0
"""So long an answer counts, also for those who gave up waiting for it."""
_PATIENCE_S = 1.0
"""After that the next look-up is started beside those that hang: a name may have come back."""
_MOST_AT_ONCE = 4


class Resolver:
    """Of one host. Belongs to the event loop that asks first."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._addresses: list[str] = []
        self._found_at = self._started_at = -math.inf
        self._num_running = 0
        self._arrival: asyncio.Future[OSError | None] | None = None

    async def addresses(self) -> list[str]:
        """At least one. Raises OSError; takes for ever where the look-ups do."""
        if is_address(self._host):
            return [self._host]
        now = time.monotonic()
        if now - self._found_at < _FRESH_S:
            return self._addresses
        loop = asyncio.get_running_loop()
        if self._arrival is None:
            self._arrival = loop.create_future()
        is_overdue = now - self._started_at > _PATIENCE_S
        if not self._num_running or (is_overdue and self._num_running < _MOST_AT_ONCE):
            self._num_running += 1
            self._started_at = now
            thread = threading.Thread(target=self._look_up, args=(loop,), daemon=True)
            thread.start()
        # Who gives up must not take the arrival from the others.
        error = await asyncio.shield(self._arrival)
        if error is not None:
            raise error
        return self._addresses

    def _look_up(self, loop: asyncio.AbstractEventLoop) -> None:
        error, found = None, list[str]()
        try:
            results = socket.getaddrinfo(self._host, None, type=socket.SOCK_STREAM)
            found = [str(address[0]) for *_, address in results]
        except OSError as problem:
            error = problem
        except UnicodeError:
            error = OSError(f"{self._host!r} is no host name")
        try:
            loop.call_soon_threadsafe(self._arrived, list(dict.fromkeys(found)), error)
        except RuntimeError:
            return  # The loop has been closed.

    def _arrived(self, found: list[str], error: OSError | None) -> None:
        self._num_running -= 1
        if error is None:
            self._addresses, self._found_at = found, time.monotonic()
        arrival, self._arrival = self._arrival, None
        if arrival is not None:
            arrival.set_result(error)


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class ResolvedConnection(Connection):
    """The client's own connection, but for the look-up."""

    def __init__(self, *, resolver: Resolver, **options: Any) -> None:
        super().__init__(**options)
        self._resolver = resolver
        self._address = self.host

    async def _connect(self) -> None:
        problem: OSError | None = None
        for address in await self._resolver.addresses():
            self._address = address
            try:
                await super()._connect()  # type: ignore[no-untyped-call]
            except OSError as error:
                problem = error
            else:
                return
        assert problem is not None
        raise problem

    def _connection_arguments(self) -> Mapping[str, Any]:
        return {**super()._connection_arguments(), "host": self._address}


class ResolvedSslConnection(ResolvedConnection, SSLConnection):
    """The certificate is still to be that of the name."""

    def _connection_arguments(self) -> Mapping[str, Any]:
        return {**super()._connection_arguments(), "server_hostname": self.host}
