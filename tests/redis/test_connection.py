"""What the directory does when its server does not."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import pytest
from redis.asyncio import Redis

from baton.shared.directory import connection as connection_module
from baton.shared.directory.connection import Connection
from baton.shared.directory.directory import (
    Directory,
    DirectoryMisconfigured,
    DirectoryUnavailable,
    open_directory,
)
from baton.shared.directory.embedded import EmbeddedValkey
from baton.shared.kv.sequence import AttemptKey
from tests.redis.test_ledger import entry
from tests.redis.test_workers import record

pytestmark = pytest.mark.redis

Call = Callable[[Directory], Awaitable[object]]
CALLS: list[Call] = [
    lambda directory: directory.ping(),
    lambda directory: directory.workers.publish(record()),
    lambda directory: directory.workers.list(),
    lambda directory: directory.prefix_index.publish("p0", "i0", added=[b"h"], removed=[b"g"]),
    lambda directory: directory.prefix_index.lookup([b"h"]),
    lambda directory: directory.prefix_index.size(),
    lambda directory: directory.ledger.write([entry()], [AttemptKey("g:2", 0, 1)]),
    lambda directory: directory.ledger.get("g:1"),
    lambda directory: directory.ledger.count_by_stage(),
]


async def eventually(call: Call, directory: Directory) -> None:
    """Calls again while the directory is unavailable, as its users do."""
    for _ in range(100):
        try:
            await call(directory)
            return
        except DirectoryUnavailable:
            await asyncio.sleep(0.05)
    await call(directory)


def kill(server: EmbeddedValkey) -> None:
    os.kill(server.pid, signal.SIGKILL)
    server.stop()


@pytest.mark.parametrize("call", CALLS)
async def test_dead_server_is_unavailable(own_server: EmbeddedValkey, call: Call) -> None:
    directory = await open_directory(own_server.url)
    await call(directory)
    kill(own_server)
    for _ in range(3):
        with pytest.raises(DirectoryUnavailable) as raised:
            await call(directory)
        assert "\n" not in str(raised.value)
    with pytest.raises(DirectoryUnavailable):
        await open_directory(own_server.url)
    await directory.aclose()


async def test_server_that_comes_back_empty_is_filled_again(own_server: EmbeddedValkey) -> None:
    directory = await open_directory(own_server.url)
    for call in CALLS:
        await call(directory)
    kill(own_server)
    with pytest.raises(DirectoryUnavailable):
        await directory.ping()
    own_server.start()
    await eventually(lambda directory: directory.ping(), directory)
    assert await directory.workers.list() == []
    for call in CALLS:
        await call(directory)
    assert await directory.workers.list() == [record()]
    assert await directory.prefix_index.lookup([b"h"]) == [{"p0": "i0"}]
    assert await directory.ledger.get("g:1") == entry()
    await directory.aclose()


async def test_forgotten_scripts_are_loaded_again(directory: Directory, redis: Redis) -> None:
    for _ in range(2):
        await redis.script_flush()
        await directory.ledger.write([entry()], [AttemptKey("g:2", 0, 1)])
        assert await directory.ledger.get("g:1") == entry()
    await redis.script_flush()
    for call in CALLS:
        await call(directory)


async def test_frozen_server_costs_each_caller_one_timeout(
    own_server: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = await open_directory(own_server.url)
    await directory.ledger.write([entry()], [])
    monkeypatch.setattr(connection_module, "CALL_TIMEOUT_S", 0.1)
    monkeypatch.setattr(connection_module, "PAUSE_S", 1.0)
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(DirectoryUnavailable, match="cannot be reached"):
            await directory.ledger.get("g:1")
        # While the pause lasts, nothing is sent.
        monkeypatch.setattr(connection_module, "CALL_TIMEOUT_S", 60.0)
        with pytest.raises(DirectoryUnavailable, match="just now"):
            await directory.ledger.get("g:1")
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    # Late replies to calls that were given up belong to nobody.
    await eventually(lambda directory: directory.ping(), directory)
    assert await directory.ledger.get("g:1") == entry()
    assert await directory.workers.list() == []
    await directory.aclose()


async def test_cancelled_call_leaves_its_connection_usable(directory: Directory) -> None:
    await directory.ledger.write([entry()], [])
    for _ in range(30):
        task = asyncio.create_task(directory.prefix_index.lookup([b"h"] * 500))
        await asyncio.sleep(0.0005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert await directory.ledger.get("g:1") == entry()


async def test_more_callers_than_connections(directory: Directory) -> None:
    await directory.ledger.write([entry()], [])
    answers = await asyncio.gather(*(directory.ledger.get("g:1") for _ in range(200)))
    assert answers == [entry()] * 200


async def test_error_reply_is_unavailable(directory: Directory, redis: Redis, cluster: str) -> None:
    await redis.set(f"baton:{{{cluster}}}:ledger:g:1:0", "not a hash")
    with pytest.raises(DirectoryUnavailable, match="refused"):
        await directory.ledger.get("g:1")
    await directory.ping()


@pytest.mark.parametrize(
    ("memory", "policy", "accepted"),
    [
        ("0", "allkeys-lru", True),
        ("100mb", "noeviction", True),
        ("100mb", "allkeys-lru", False),
        ("100mb", "volatile-ttl", False),
    ],
)
async def test_eviction_is_refused(
    own_server: EmbeddedValkey, memory: str, policy: str, accepted: bool
) -> None:
    async with Redis.from_url(own_server.url) as client:
        await client.config_set("maxmemory", memory)
        await client.config_set("maxmemory-policy", policy)
    if accepted:
        await (await open_directory(own_server.url)).aclose()
    else:
        with pytest.raises(DirectoryMisconfigured, match="noeviction"):
            await open_directory(own_server.url)


@pytest.mark.parametrize("url", ["", "localhost", "http://x", "redis://:secret@h:port/0"])
async def test_bad_url_is_told_without_its_password(url: str) -> None:
    with pytest.raises(DirectoryMisconfigured) as raised:
        await open_directory(url)
    assert "secret" not in str(raised.value)
    assert raised.value.__suppress_context__


@pytest.mark.parametrize("cluster", ["", "a}b", "a*", "a b", "x" * 65])
async def test_bad_cluster_name_is_refused(server: EmbeddedValkey, cluster: str) -> None:
    with pytest.raises(DirectoryMisconfigured):
        await open_directory(server.url, cluster)


async def test_cancel_that_the_client_swallows_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """As asyncio.wait_for of Python 3.11 does when what it waits for ends at the same time."""
    connection = Connection("redis://127.0.0.1:1", [])

    async def swallow(commands: object) -> list[str]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return ["PONG"]
        return []

    monkeypatch.setattr(connection, "_send", swallow)
    call = asyncio.create_task(connection.execute([("PING",)]))
    await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
