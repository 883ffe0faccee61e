"""A cluster serves one model: whatever is started, lost or replaced, and in whatever order."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from baton.services.gateway import cluster as cluster_module
from baton.services.gateway.cluster import Cluster
from baton.services.gateway.served_model import ServedModel
from baton.shared.directory.cluster_model import ClusterModel
from baton.shared.directory.directory import Directory, OtherModel, open_directory
from baton.shared.directory.embedded import EmbeddedValkey
from baton.shared.directory.keys import WORKER_TTL_S, Keys
from baton.shared.directory.workers import WorkerRecord, model_of
from tests.redis.test_workers import record

pytestmark = pytest.mark.redis


def of_model(letter: str, worker_id: str = "p0") -> WorkerRecord:
    one = record(worker_id, incarnation=f"{worker_id}-{letter}")
    capability = dataclasses.replace(one.capability, model_digest=64 * letter)
    facts = dataclasses.replace(one.model, model_name=f"model-{letter}")
    return dataclasses.replace(one, capability=capability, model=facts)


async def test_the_first_worker_sets_it_and_others_are_refused_by_name(
    directory: Directory, cluster: str
) -> None:
    workers = directory.workers
    assert (await workers.view("g")).model is None
    await workers.publish(of_model("a"))
    await workers.publish(of_model("a", "p1"))
    served = ClusterModel(64 * "a", "model-a", 2048)
    assert await workers.model() == served
    for worker_id in ("p0", "d0"):
        with pytest.raises(OtherModel) as raised:
            await workers.publish(of_model("b", worker_id))
        message = str(raised.value)
        assert cluster in message and "\n" not in message
        assert "'model-a' (digest aaaaaa" in message and "'model-b' (digest bbbbbb" in message
    view = await workers.view("g")
    assert (view.model, view.records) == (served, [of_model("a"), of_model("a", "p1")])
    assert view.refusal is None


async def test_one_of_two_that_come_at_once_is_refused(directory: Directory) -> None:
    results = await asyncio.gather(
        *(directory.workers.publish(of_model(letter, letter)) for letter in "abcabc"),
        return_exceptions=True,
    )
    refused = [isinstance(result, OtherModel) for result in results]
    assert refused.count(False) == 2
    assert len({each.model.model_name for each in await directory.workers.list()}) == 1


async def test_after_the_last_worker_has_left_another_model_may_come(directory: Directory) -> None:
    workers = directory.workers
    await workers.publish(of_model("a", "p0"))
    await workers.publish(of_model("a", "p1"))
    await workers.remove("p0", "p0-a")
    with pytest.raises(OtherModel):
        await workers.publish(of_model("b", "p0"))
    await workers.remove("p1", "p1-a")
    assert await workers.model() is None
    await workers.publish(of_model("b", "p0"))
    with pytest.raises(OtherModel):
        await workers.publish(of_model("a", "p1"))
    # Who was refused, and leaves in the end, takes nothing away.
    await workers.remove("p1", "p1-a")
    assert await workers.model() == model_of(of_model("b"))


async def test_it_lives_as_long_as_the_last_record(
    directory: Directory, redis: Redis, cluster: str
) -> None:
    keys = Keys(cluster)
    await directory.workers.publish(of_model("a"))
    assert 0 < await redis.pttl(keys.model) <= WORKER_TTL_S * 1000
    await redis.pexpire(keys.model, 300)
    await directory.workers.publish(of_model("a"))
    assert await redis.pttl(keys.model) > 300
    # As of workers that were killed, one by one.
    for key in (keys.model, keys.workers, keys.worker("p0")):
        await redis.pexpire(key, 0)
    await directory.workers.publish(of_model("b"))
    assert await directory.workers.list() == [of_model("b")]


async def test_a_worker_that_was_killed_does_not_outlive_the_others(
    directory: Directory, redis: Redis, cluster: str
) -> None:
    """The last to leave is the last that lives: what a killed one left has expired."""
    keys = Keys(cluster)
    await directory.workers.publish(of_model("a", "killed"))
    await directory.workers.publish(of_model("a", "p0"))
    await redis.zadd(keys.workers, {"killed": 1})
    await directory.workers.remove("p0", "p0-a")
    assert await directory.workers.model() is None


async def test_a_server_that_lost_everything_is_told_again(own_server: EmbeddedValkey) -> None:
    directory = await open_directory(own_server.url)
    await directory.workers.publish(of_model("a"))
    os.kill(own_server.pid, signal.SIGKILL)
    own_server.stop()
    own_server.start()
    again = await open_directory(own_server.url)
    assert await again.age_s() <= 1
    await again.workers.publish(of_model("a"))
    with pytest.raises(OtherModel):
        await again.workers.publish(of_model("b", "p1"))
    await again.aclose()
    await directory.aclose()


async def test_clusters_have_their_own(directory: Directory, server: EmbeddedValkey) -> None:
    await directory.workers.publish(of_model("a"))
    other = Directory(directory._connection, Keys("another"))
    await other.workers.publish(of_model("b"))
    assert await directory.workers.model() == model_of(of_model("a"))
    await other.workers.remove("p0", "p0-b")


async def test_a_gateway_of_another_model_is_refused_when_its_workers_stay(
    directory: Directory, server: EmbeddedValkey, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "WORKER_TTL_S", 0.3)
    monkeypatch.setattr(cluster_module, "_POLL_S", 0.02)
    served = ServedModel("mine", 2048)
    served.has_weights(64 * "b")
    gateway = Cluster(server.url, cluster, incarnation="g", model=cast(Any, None), served=served)
    await directory.workers.publish(of_model("a"))
    assert await gateway.registered() == [of_model("a")]
    with pytest.raises(OtherModel, match="'model-a' .digest aaa.*'mine' .digest bbb"):
        await gateway.connect()
    assert not gateway.records()
    # As of workers that were killed just before.
    monkeypatch.setattr(cluster_module, "WORKER_TTL_S", 60.0)
    num_looks = 0

    async def look() -> None:
        nonlocal num_looks
        await refresh()
        num_looks += 1

    refresh = gateway._try_refresh
    monkeypatch.setattr(gateway, "_try_refresh", look)
    connecting = asyncio.create_task(gateway.connect())
    # It must not take the model that is there.
    async with asyncio.timeout(60):
        while num_looks < 3:
            await asyncio.sleep(0.01)
    await directory.workers.remove("p0", "p0-a")
    await directory.workers.publish(of_model("b"))
    async with asyncio.timeout(60):
        await connecting
        # It may have looked while neither was there, and have come with a model of its own.
        while not gateway.records():
            await asyncio.sleep(0.01)
    assert gateway.records() == [of_model("b")]
    await gateway.close()


async def test_a_name_that_is_no_utf8_is_no_obstacle(directory: Directory) -> None:
    one = of_model("a")
    odd = dataclasses.replace(one.model, model_name=os.fsdecode(b"\xff-model"))
    await directory.workers.publish(dataclasses.replace(one, model=odd))
    assert await directory.workers.model() == ClusterModel(64 * "a", "?-model", 2048)


async def test_foreign_bytes_in_its_place_are_no_model(
    directory: Directory, redis: Redis, cluster: str
) -> None:
    await redis.hset(Keys(cluster).model, mapping={"digest": b"\xff", "vocab_size": "many"})
    found = await directory.workers.model()
    assert found is not None and found.vocab_size == 0
    with pytest.raises(OtherModel):
        await directory.workers.publish(of_model("a"))
