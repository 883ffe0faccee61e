"""The server's name is looked up, and nothing waits for a look-up that hangs."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from baton.shared.directory import connection
from baton.shared.directory.directory import DirectoryUnavailable, open_directory
from baton.shared.directory.embedded import EmbeddedValkey

pytestmark = pytest.mark.redis

ROOT = Path(__file__).parents[2]
HOST = "redis.test"


@asynccontextmanager
async def on_tcp(server: EmbeddedValkey, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A port of 127.0.0.1 that leads to the server."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = server.url.removeprefix("unix://")
        inner_reader, inner_writer = await asyncio.open_unix_connection(path)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls) as listener:
        yield listener.sockets[0].getsockname()[1]


def resolve_to(monkeypatch: pytest.MonkeyPatch, find: Callable[[], list[str]]) -> None:
    real = socket.getaddrinfo

    def getaddrinfo(host: str, *args: Any, **options: Any) -> Any:
        found = find() if host == HOST else [host]
        return [entry for address in found for entry in real(address, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


async def test_every_address_of_a_name_is_tried(
    server: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, lambda: ["::1", "127.0.0.2", "127.0.0.1"])
    async with on_tcp(server) as port:
        directory = await open_directory(f"redis://{HOST}:{port}/0")
        await directory.ping()
        await directory.aclose()


async def test_an_unknown_name_is_a_directory_that_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def find() -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    resolve_to(monkeypatch, find)
    with pytest.raises(DirectoryUnavailable, match="Name or service not known"):
        await open_directory(f"redis://{HOST}:6379")


async def test_a_look_up_that_hangs_is_given_up_and_used_when_it_comes(
    server: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered, num_asked = threading.Event(), 0

    def hang() -> list[str]:
        nonlocal num_asked
        num_asked += 1
        answered.wait(60)
        return ["127.0.0.1"]

    resolve_to(monkeypatch, hang)
    monkeypatch.setattr("baton.shared.directory.resolver._PATIENCE_S", 0.0)
    monkeypatch.setattr(connection, "CALL_TIMEOUT_S", 0.05)
    monkeypatch.setattr(connection, "PAUSE_S", 0.0)
    async with on_tcp(server) as port:
        link = connection.Connection(f"redis://{HOST}:{port}", [])
        for _ in range(10):
            with pytest.raises(DirectoryUnavailable):
                await link.execute([("PING",)])
        assert num_asked == 4, "only so many hang at a time"
        monkeypatch.setattr(connection, "CALL_TIMEOUT_S", 5.0)
        answered.set()
        assert await link.execute([("ECHO", "hello")]) == ["hello"]
        await link.aclose()


def test_a_process_ends_although_a_look_up_hangs() -> None:
    code = """
import asyncio, socket, time, uvloop
from baton.shared.directory.directory import DirectoryUnavailable, open_directory
socket.getaddrinfo = lambda *args, **options: time.sleep(600)
async def main():
    for _ in range(2):
        try:
            await open_directory("redis://redis.test:6379")
        except DirectoryUnavailable as error:
            print(error)
uvloop.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2


async def test_a_certificate_must_be_that_of_the_name(
    server: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    resolve_to(monkeypatch, lambda: ["127.0.0.1"])
    for name in (HOST, "other.test"):
        pem, key = tmp_path / f"{name}.pem", tmp_path / f"{name}.key"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"]
        command += ["-pkeyopt", "ec_paramgen_curve:prime256v1"]
        command += ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
        command += ["-keyout", str(key), "-out", str(pem)]
        subprocess.run(command, check=True, capture_output=True)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(pem, key)
        async with on_tcp(server, tls) as port:
            url = f"rediss://{HOST}:{port}/0?ssl_ca_certs={pem}"
            if name == HOST:
                await (await open_directory(url)).aclose()
            else:
                with pytest.raises(DirectoryUnavailable, match=r"(?i)certificate"):
                    await open_directory(url)
