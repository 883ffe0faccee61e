"""One bounded round trip to the server, and the two ways in which the directory can fail.

A batch of commands travels together and is answered together. It takes at most `CALL_TIMEOUT_S`,
whatever the server does; nothing is tried twice, except scripts that a restarted server has
forgotten. After the server could not be reached, calls fail at once for `PAUSE_S`, so that a dead
directory costs requests nothing and is not met with a storm of connections when it returns.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from baton.shared.directory.resolver import (
    ResolvedConnection,
    ResolvedSslConnection,
    Resolver,
)

CALL_TIMEOUT_S = 0.5
PAUSE_S = 0.25
_NUM_CONNECTIONS = 8
_SCAN_COUNT = 1000

Command = tuple[str | bytes | int, ...]


class DirectoryUnavailable(Exception):
    """The server cannot be reached, is too slow, or refuses. The message is one line."""


class DirectoryRefused(DirectoryUnavailable):
    """The server answers, but not what it was asked: it is a replica, or its disk is full, say."""


class DirectoryMisconfigured(Exception):
    """The server answers, but must not be used as it is. The message is one line."""


class Script:
    """A Lua script that the server runs by its digest. Scripts can be run twice without harm."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    def call(self, keys: Sequence[str], *args: str | int) -> Command:
        return ("EVALSHA", self.sha, len(keys), *keys, *args)


class Connection:
    """A few reused connections to one server.

    `DirectoryMisconfigured` for a URL that names no server.
    """

    def __init__(self, url: str, scripts: Sequence[Script]) -> None:
        try:
            pool = _pool(url)
        except ValueError:
            # The parser's own message may repeat the URL, and with it a password.
            raise DirectoryMisconfigured(
                "redis URL is malformed; expected redis://, rediss:// or unix://"
            ) from None
        self._redis = Redis.from_pool(pool)
        self._scripts = {script.sha: script for script in scripts}
        self._paused_until = 0.0
        self._problem = ""
        """Why it is paused."""

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        """Replies in the order of `commands`, after one round trip.

        `DirectoryUnavailable` when any of them failed, `DirectoryRefused` when the server says
        so; the others may have been executed.
        """
        task = asyncio.current_task()
        num_cancels = task.cancelling() if task else 0
        try:
            return await self._execute(commands)
        finally:
            # Python 3.11's wait_for, which the client uses, may swallow a cancel.
            if task and task.cancelling() > num_cancels:
                raise asyncio.CancelledError

    async def _execute(self, commands: Sequence[Command]) -> list[Any]:
        if not commands:
            return []
        if time.monotonic() < self._paused_until:
            problem = f"directory could not be reached just now: {self._problem}"
            raise DirectoryUnavailable(problem)
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                replies = await self._send(commands)
                forgotten = [
                    index for index, reply in enumerate(replies) if isinstance(reply, NoScriptError)
                ]
                if forgotten:
                    again = await self._send_with_scripts([commands[index] for index in forgotten])
                    for index, reply in zip(forgotten, again, strict=True):
                        replies[index] = reply
        except (RedisConnectionError, RedisTimeoutError, OSError, TimeoutError) as error:
            self._paused_until = time.monotonic() + PAUSE_S
            self._problem = _line(error)
            raise DirectoryUnavailable(f"directory cannot be reached: {self._problem}") from error
        except RedisError as error:
            raise DirectoryUnavailable(f"directory failed: {_line(error)}") from error
        for reply in replies:
            if isinstance(reply, Exception):
                raise DirectoryRefused(f"directory refused: {_line(reply)}") from reply
        return replies

    async def scan(self, pattern: str) -> AsyncIterator[list[str]]:
        """Pages of the keys that match, each key once; one round trip a page.

        Keys that come or go meanwhile may be missed.
        """
        seen: set[str] = set()
        cursor = 0
        while True:
            [(next_cursor, keys)] = await self.execute(
                [("SCAN", cursor, "MATCH", pattern, "COUNT", _SCAN_COUNT)]
            )
            page = [key for key in dict.fromkeys(keys) if key not in seen]
            seen.update(page)
            yield page
            cursor = int(next_cursor)
            if cursor == 0:
                return

    async def aclose(self) -> None:
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    async def _send(self, commands: Sequence[Command]) -> list[Any]:
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        return replies

    async def _send_with_scripts(self, commands: Sequence[Command]) -> list[Any]:
        needed = dict.fromkeys(str(command[1]) for command in commands)
        loads: list[Command] = [("SCRIPT", "LOAD", self._scripts[sha].text) for sha in needed]
        replies = await self._send([*loads, *commands])
        for reply in replies[: len(loads)]:
            if isinstance(reply, Exception):
                # That says why; those to the commands only that the script is unknown.
                return [reply] * len(commands)
        return replies[len(loads) :]


def _pool(url: str) -> BlockingConnectionPool:
    """Raises ValueError."""
    of_url: dict[str, Any] = dict(parse_url(url))
    connection_class = of_url.pop("connection_class", None)
    if connection_class is not UnixDomainSocketConnection:
        is_encrypted = connection_class is SSLConnection
        connection_class = ResolvedSslConnection if is_encrypted else ResolvedConnection
        of_url["resolver"] = Resolver(of_url.get("host", "localhost"))
    options = {
        "connection_class": connection_class,
        "max_connections": _NUM_CONNECTIONS,
        "timeout": CALL_TIMEOUT_S,
        "socket_timeout": CALL_TIMEOUT_S,
        "socket_connect_timeout": CALL_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
        # Foreign bytes under our keys become malformed entries, not exceptions.
        "decode_responses": True,
        "encoding_errors": "replace",
        # What the URL says wins, as the client's own `from_url` has it.
        **of_url,
    }
    return BlockingConnectionPool(**options)


def _line(error: Exception) -> str:
    if isinstance(error, TimeoutError) and not str(error):
        return f"no answer within {CALL_TIMEOUT_S:g} s"
    if isinstance(error, ResponseError) or str(error):
        # Servers say in which script and line it was, too.
        return re.sub(r"\.? script: [\w, ]*on @user_script:\d+\.?$", "", str(error).splitlines()[0])
    return type(error).__name__
