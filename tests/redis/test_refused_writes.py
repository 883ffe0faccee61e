"""A server that answers reads and refuses writes is as good as dead, and says why.

Nobody can say that he lives then, so records run out; a gateway must not take that for the end of
its workers.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from baton.services.gateway import cluster as cluster_module
from baton.services.gateway.cluster import Cluster
from baton.services.gateway.served_model import ServedModel
from baton.shared.directory import connection as connection_module
from baton.shared.directory.directory import Directory, DirectoryRefused, open_directory
from baton.shared.directory.embedded import EmbeddedValkey
from baton.shared.directory.keys import Keys
from baton.shared.kv.sequence import AttemptKey
from tests.redis.test_cluster_model import of_model
from tests.redis.test_ledger import entry

pytestmark = pytest.mark.redis

KEYS = Keys("default")
TTL_S = 0.2
WORKER = dataclasses.replace(of_model("a", "both-0"), role="both")


@pytest.fixture
async def admin(own_server: EmbeddedValkey) -> AsyncIterator[Any]:
    client = Redis.from_url(own_server.url, decode_responses=True)
    yield client
    # Otherwise it would not end before it had saved.
    await client.config_set("save", "")
    await client.aclose()


@pytest.fixture
async def writer(own_server: EmbeddedValkey) -> AsyncIterator[Directory]:
    """As in a worker, which has registered."""
    directory = await open_directory(own_server.url)
    await directory.workers.publish(WORKER)
    yield directory
    await directory.aclose()


@pytest.fixture
async def cluster(
    own_server: EmbeddedValkey, writer: Directory, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Cluster]:
    """As in a gateway, which knows the worker; what takes seconds there takes tenths here."""
    monkeypatch.setattr(cluster_module, "WORKER_TTL_S", TTL_S)
    monkeypatch.setattr(cluster_module, "_POLL_S", 0.02)
    served = ServedModel("model-a", 2048)
    cluster = Cluster(
        own_server.url, "default", incarnation="g", model=cast(Any, None), served=served
    )
    await cluster.connect()
    assert cluster.has_route() and cluster.is_directory_reachable
    following = asyncio.create_task(cluster.follow())
    yield cluster
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await cluster.close()


async def failed_save(admin: Any) -> None:
    """What is saved cannot be put in its place, as on a disk that is full."""
    await admin.config_set("stop-writes-on-bgsave-error", "no")
    directory = (await admin.config_get("dir"))["dir"]
    (Path(directory) / "dump.rdb").mkdir()
    await admin.config_set("save", "3600 1")
    await admin.bgsave()
    async with asyncio.timeout(60):
        while (await admin.info("persistence"))["rdb_last_bgsave_status"] == "ok":
            await asyncio.sleep(0.02)


REFUSALS = {
    "no replica": ("CONFIG SET min-replicas-to-write 1", "NOREPLICAS"),
    "disk full": ("CONFIG SET stop-writes-on-bgsave-error yes", "MISCONF"),
    "replica": ("REPLICAOF 127.0.0.1 1", "read only replica"),
    "memory full": ("CONFIG SET maxmemory 1", "maxmemory"),
    "may not write": ("ACL SETUSER default -@write", "can't run this command|no permissions"),
    "may not run scripts": ("ACL SETUSER default -evalsha", "no permissions to run the 'evalsha'"),
}
"""What makes the server refuse writes, and what it says then."""
ENDS = (
    "ACL SETUSER default +@all",
    "CONFIG SET min-replicas-to-write 0",
    "CONFIG SET stop-writes-on-bgsave-error no",
    "CONFIG SET maxmemory 0",
    "REPLICAOF NO ONE",
)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("kind", REFUSALS)
async def test_workers_stay_known_while_nobody_can_write(
    kind: str, admin: Any, writer: Directory, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    refuse, reason = REFUSALS[kind]
    if kind == "disk full":
        await failed_save(admin)
        # That may have taken longer than the record lives.
        await writer.workers.publish(WORKER)
        await until(cluster.has_route)
    # It runs out long before it would by itself.
    for key in (KEYS.worker(WORKER.worker_id), KEYS.workers, KEYS.model):
        await admin.pexpire(key, 500)
    await admin.execute_command(*refuse.split())
    for write in (
        writer.workers.publish(WORKER),
        writer.ledger.write([entry()], [AttemptKey("g:2", 0, 1)]),
        writer.prefix_index.publish("p0", "i0", added=[b"h"], removed=[b"g"]),
    ):
        with pytest.raises(DirectoryRefused, match=reason) as raised:
            await write
        assert "\n" not in str(raised.value)
    await until(lambda: not cluster.is_directory_reachable)
    assert re.search(reason, str(cluster.directory_problem))
    [logged] = [each for each in caplog.records if each.getMessage() == "the directory refuses"]
    assert re.search(reason, str(vars(logged)["fields"]["message"]))

    while await admin.exists(KEYS.worker(WORKER.worker_id)):
        await asyncio.sleep(0.02)
    # A gateway that believes the empty set has dropped the worker by then.
    await asyncio.sleep(2 * TTL_S)
    assert cluster.has_route(), "an empty set was believed"

    for command in ENDS:
        await admin.execute_command(*command.split())
    await until(lambda: cluster.is_directory_reachable)
    assert cluster.has_route(), "workers have the time to register again"
    await until(lambda: not cluster.has_route())
    await writer.workers.publish(WORKER)
    await until(cluster.has_route)


async def test_writes_that_hang_are_a_directory_that_is_away(
    admin: Any, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before a failover: the server answers those who only read."""
    monkeypatch.setattr(connection_module, "CALL_TIMEOUT_S", 0.5)
    await admin.execute_command("CLIENT", "PAUSE", "60000", "WRITE")
    await until(lambda: not cluster.is_directory_reachable)
    # As above.
    await asyncio.sleep(2 * TTL_S)
    assert cluster.has_route()
    await admin.execute_command("CLIENT", "UNPAUSE")
    await until(lambda: cluster.is_directory_reachable)
