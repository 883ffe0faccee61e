"""A real server for these tests: redis-server when there is one, else the embedded Valkey."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from baton.shared.directory import connection
from baton.shared.directory.directory import Directory, open_directory
from baton.shared.directory.embedded import EmbeddedValkey


def _new_server() -> EmbeddedValkey:
    installed = shutil.which("redis-server")
    return EmbeddedValkey(Path(installed) if installed else None)


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedValkey]:
    with _new_server() as server:
        yield server


@pytest.fixture
def own_server() -> Iterator[EmbeddedValkey]:
    """For tests that kill it, freeze it or change its settings."""
    with _new_server() as server:
        yield server


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers is not given up, however busy the machine is. Tests of one that does
    not set a limit of their own."""
    monkeypatch.setattr(connection, "CALL_TIMEOUT_S", 60.0)


@pytest.fixture
def cluster() -> str:
    """A name that no other test uses."""
    return f"test-{secrets.token_hex(4)}"


@pytest_asyncio.fixture
async def directory(server: EmbeddedValkey, cluster: str) -> AsyncIterator[Directory]:
    directory = await open_directory(server.url, cluster)
    yield directory
    await directory.aclose()


@pytest_asyncio.fixture
async def redis(server: EmbeddedValkey) -> AsyncIterator[Redis]:
    """The same server without our code in between."""
    client = Redis.from_url(server.url, decode_responses=True)
    yield client
    await client.aclose()
