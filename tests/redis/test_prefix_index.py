from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import pytest
from redis.asyncio import Redis

from baton.shared.directory.connection import Command, Connection
from baton.shared.directory.directory import Directory
from baton.shared.directory.keys import PREFIX_TTL_S, Keys

pytestmark = pytest.mark.redis


def hashes(num: int) -> list[bytes]:
    return [hashlib.sha256(bytes([i % 256, i // 256])).digest() for i in range(num)]


async def test_lookup_tells_every_holder(directory: Directory) -> None:
    index = directory.prefix_index
    a, b, c = hashes(3)
    await index.publish("p0", "i0", added=[a, b], removed=[])
    await index.publish("p1", "i1:with:colons", added=[b], removed=[])
    assert await index.lookup([c, b, a, b]) == [
        {},
        {"p0": "i0", "p1": "i1:with:colons"},
        {"p0": "i0"},
        {"p0": "i0", "p1": "i1:with:colons"},
    ]
    assert await index.lookup([]) == []


async def test_many_hashes_keep_their_order(directory: Directory) -> None:
    all_hashes = hashes(5000)
    await directory.prefix_index.publish("p0", "i0", added=all_hashes[::2], removed=[])
    found = await directory.prefix_index.lookup(all_hashes[:500])
    assert found == [{"p0": "i0"} if i % 2 == 0 else {} for i in range(500)]
    assert await directory.prefix_index.size() == 2500


async def test_lookup_is_one_round_trip(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    await directory.prefix_index.lookup(hashes(1))
    num_commands = []
    send = Connection._send

    async def counting(self: Connection, commands: Sequence[Command]) -> list[Any]:
        num_commands.append(len(commands))
        return await send(self, commands)

    monkeypatch.setattr(Connection, "_send", counting)
    await directory.prefix_index.lookup(hashes(300))
    assert num_commands == [5]


async def test_removal(directory: Directory) -> None:
    index = directory.prefix_index
    a, b = hashes(2)
    await index.publish("p0", "i0", added=[a, b], removed=[])
    await index.publish("p1", "i1", added=[a], removed=[])
    await index.publish("p0", "i0", added=[], removed=[a, b])
    assert await index.lookup([a, b]) == [{"p1": "i1"}, {}]
    assert await index.size() == 1


async def test_another_incarnation_removes_nothing(directory: Directory) -> None:
    index = directory.prefix_index
    [a] = hashes(1)
    await index.publish("p0", "new", added=[a], removed=[])
    await index.publish("p0", "old", added=[], removed=[a])
    await index.publish("p1", "new", added=[], removed=[a])
    assert await index.lookup([a]) == [{"p0": "new"}]


async def test_added_wins_over_removed(directory: Directory) -> None:
    [a] = hashes(1)
    await directory.prefix_index.publish("p0", "i0", added=[a], removed=[a])
    assert await directory.prefix_index.lookup([a]) == [{"p0": "i0"}]


async def test_each_holder_expires_by_itself(
    directory: Directory, redis: Redis, cluster: str
) -> None:
    index = directory.prefix_index
    [a] = hashes(1)
    key = Keys(cluster).prefix(a)
    await index.publish("old", "i0", added=[a], removed=[])
    await index.publish("new", "i1", added=[a], removed=[])
    assert 0 < await redis.pttl(key) <= PREFIX_TTL_S * 1000
    await redis.hset(key, "old", "1000:i0")
    await redis.hset(key, "garbage", "?")
    assert await index.lookup([a]) == [{"new": "i1"}]
    await index.publish("third", "i2", added=[a], removed=[])
    assert set(await redis.hkeys(key)) == {"new", "third"}
