from __future__ import annotations

import dataclasses
import json
import logging

import pytest
from redis.asyncio import Redis

from baton.shared.directory.directory import Directory
from baton.shared.directory.keys import WORKER_TTL_S, Keys
from baton.shared.directory.workers import (
    ModelFacts,
    WorkerLoad,
    WorkerRecord,
    decode_record,
    encode_record,
)
from baton.shared.kv.capability import Capability
from baton.shared.kv.capacity import Capacity, GroupShare

pytestmark = pytest.mark.redis


GROUPS = (GroupShare(0), GroupShare(1, 9), GroupShare(1, 7))


def record(worker_id: str = "p0", incarnation: str = "a1") -> WorkerRecord:
    return WorkerRecord(
        worker_id=worker_id,
        incarnation=incarnation,
        role="prefill",
        address="127.0.0.1:4242",
        capability=Capability("d" * 64, "float32", "bfloat16", 16, ("full:2x32", "axes"), "exact"),
        model=ModelFacts("demo", "llama", 2048, (1, 2)),
        capacity=Capacity(
            16, (128, 40), (GroupShare(0), GroupShare(1, 9), GroupShare(1, 7)), 4096, (4096, 512)
        ),
        load=WorkerLoad(1, 2, (3, 0), {"num_steps": 7}, 9000, {"d1:é": 5_000_000_000}),
    )


async def test_records_come_back_as_published(directory: Directory) -> None:
    records = [record("d0"), record("p0"), record("p1:with:colons é")]
    for each in reversed(records):
        await directory.workers.publish(each)
    assert await directory.workers.list() == records


async def test_heartbeat_replaces_the_record(directory: Directory) -> None:
    await directory.workers.publish(record())
    busier = dataclasses.replace(record(), load=WorkerLoad(9, 9, (0, 40), {}))
    await directory.workers.publish(busier)
    assert await directory.workers.list() == [busier]


async def test_only_the_registered_incarnation_is_removed(directory: Directory) -> None:
    await directory.workers.publish(record(incarnation="new"))
    await directory.workers.remove("p0", "old")
    assert await directory.workers.list() == [record(incarnation="new")]
    await directory.workers.remove("p0", "new")
    assert await directory.workers.list() == []


async def test_silent_worker_expires(directory: Directory, redis: Redis, cluster: str) -> None:
    keys = Keys(cluster)
    await directory.workers.publish(record("p0"))
    await directory.workers.publish(record("p1"))
    for key in (keys.worker("p0"), keys.workers):
        assert 0 < await redis.pttl(key) <= WORKER_TTL_S * 1000
    await redis.pexpire(keys.worker("p0"), 0)
    assert await directory.workers.list() == [record("p1")]


async def test_expired_workers_leave_the_index(
    directory: Directory, redis: Redis, cluster: str
) -> None:
    keys = Keys(cluster)
    await directory.workers.publish(record("p0"))
    await redis.zadd(keys.workers, {"p0": 1})
    await directory.workers.publish(record("p1"))
    assert await redis.zrange(keys.workers, 0, -1) == ["p1"]


async def test_bad_record_is_left_out_and_logged_once(
    directory: Directory, redis: Redis, cluster: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys = Keys(cluster)
    await directory.workers.publish(record("bad"))
    await directory.workers.publish(record("good"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await redis.hset(keys.worker("bad"), "record", b"\xff\xfe{")
            assert await directory.workers.list() == [record("good")]
    [logged] = caplog.records
    assert vars(logged)["fields"]["worker_id"] == "bad"


async def test_clusters_do_not_see_each_other(directory: Directory, redis: Redis) -> None:
    await directory.workers.publish(record())
    other = Directory(directory._connection, Keys("another"))
    assert await other.workers.list() == []


def _changed(*path: str, to: object) -> str:
    fields = json.loads(encode_record(record()))
    part = fields
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = to
    return json.dumps(fields)


def _without(name: str) -> str:
    fields = json.loads(encode_record(record()))
    del fields[name]
    return json.dumps(fields)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[" * 100_000,
        _changed("schema", to=1),
        _without("address"),
        _without("load"),
        _changed("role", to="boss"),
        _changed("capacity", to=128),
        _changed("capacity", "block_size", to=0),
        _changed("capacity", "num_blocks", to=[128, -1]),
        _changed("capacity", "num_blocks", to=[128, True]),
        _changed("capacity", "num_blocks", to="128"),
        _changed("capacity", "num_blocks", to=[]),
        _changed("capacity", "num_blocks", to=[128]),
        _changed("capacity", "groups", to=[]),
        _changed("capacity", "groups", to=[0]),
        _changed("capacity", "groups", to=[{"pool": 2, "max_blocks": None}]),
        _changed("capacity", "groups", to=[{"pool": -1, "max_blocks": None}]),
        _changed("capacity", "groups", to=[{"pool": 0, "max_blocks": -1}]),
        _changed("capacity", "groups", to=[{"pool": 0}]),
        _changed("capability", "layout", to=[1]),
        _changed("capability", "cache_dtype", to=2),
        _changed("capability", to=[]),
        _changed("model", "eos_token_ids", to="12"),
        _changed("load", "counters", to={"num_steps": 1.5}),
        _changed("load", "num_free_blocks", to=3),
        _changed("load", "num_free_blocks", to=[3]),
        _changed("load", "num_free_blocks", to=[3, -1]),
        _changed("load", "num_free_blocks", to=[3, None]),
    ],
)
def test_malformed_records_are_value_errors(text: str) -> None:
    with pytest.raises(ValueError):
        decode_record(text)


def test_fields_of_a_later_version_are_ignored() -> None:
    assert decode_record(_changed("load", "num_dreams", to=1)) == record()
