"""What a connection may cost, and how the endpoint leaves: without workers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from typing import cast

import pytest

from baton.services.gateway.openai import body, guard
from baton.services.gateway.openai.endpoint import HttpEndpoint
from baton.v1 import inference_service_pb2 as pb
from tests.ipv6 import needs_ipv6
from tests.unit.gateway.null_frontend import (
    NullFrontend,
    Reply,
    ask,
    chunk,
    connect,
    endless,
    finished,
    new_endpoint,
    num_refused,
    send,
    serving,
    started,
    wait_until,
)

_COMPLETIONS = "/v1/completions"
_HELLO = b'{"prompt": "hello", "stream": true}'
_REQUEST = (
    f"POST {_COMPLETIONS} HTTP/1.1\r\nhost: t\r\ncontent-length: {len(_HELLO)}\r\n\r\n".encode()
    + _HELLO
)


@pytest.fixture
def frontend() -> NullFrontend:
    return NullFrontend()


@pytest.fixture
async def endpoint(frontend: NullFrontend) -> AsyncIterator[HttpEndpoint]:
    async with serving(frontend) as endpoint:
        yield endpoint


async def test_headers_too_large(endpoint: HttpEndpoint, frontend: NullFrontend) -> None:
    head = b"GET /health HTTP/1.1\r\nhost: t\r\nx: " + b"a" * 2 * guard.MAX_HEAD_BYTES
    reply = Reply(await send(endpoint.address, head))
    assert (reply.status, reply.error["code"]) == (431, "headers_too_large")
    assert num_refused(frontend) == {"431": 1}


async def test_an_answer_reaches_a_client_that_is_still_sending(endpoint: HttpEndpoint) -> None:
    head = b"GET /health HTTP/1.1\r\nhost: t\r\nx: " + b"a" * 64 * guard.MAX_HEAD_BYTES
    for _ in range(10):
        assert Reply(await send(endpoint.address, head)).status == 431


@pytest.mark.parametrize("path", ["/v1/completions", "/nowhere"])
async def test_a_request_refused_in_the_middle_of_its_body_is_counted_once(
    frontend: NullFrontend, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """Its handler has begun by then, and would answer too."""
    head = f"POST {path} HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    async with serving(frontend) as endpoint:
        reply = Reply(await send(endpoint.address, head + b"no length\r\n"))
    assert (reply.status, reply.error["code"]) == (400, "invalid_http")
    assert num_refused(frontend) == {"400": 1}
    assert caplog.text == ""


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01 hello\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: t\r\ncontent-length: few\r\n\r\n",
    ],
    ids=["no http", "no host", "bad length"],
)
async def test_a_malformed_request(
    endpoint: HttpEndpoint, frontend: NullFrontend, sent: bytes
) -> None:
    reply = Reply(await send(endpoint.address, sent))
    assert (reply.status, reply.error["code"]) == (400, "invalid_http")
    assert reply.error["message"] == "malformed request"
    assert num_refused(frontend) == {"400": 1}


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nhost: "])
async def test_headers_that_do_not_come(
    endpoint: HttpEndpoint, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(guard, "HEAD_LIMIT_S", 0.1)
    reply = Reply(await send(endpoint.address, sent))
    assert (reply.status, reply.error["code"]) == (408, "timeout")


async def test_the_limit_on_headers_is_for_the_next_request_too(
    endpoint: HttpEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "HEAD_LIMIT_S", 0.1)
    reader, writer = await connect(endpoint.address)
    writer.write(b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n")
    assert b" 200 " in await reader.readline()
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"GET /health HT")
    reply = Reply(await reader.read())
    assert reply.status == 408
    writer.close()


async def test_a_body_that_does_not_come(
    endpoint: HttpEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "BODY_LIMIT_S", 0.1)
    request = b"POST /v1/completions HTTP/1.1\r\nhost: t\r\nconnection: close\r\n"
    reply = Reply(await send(endpoint.address, request + b"content-length: 100\r\n\r\n{"))
    assert (reply.status, reply.error["code"]) == (408, "timeout")


async def test_one_connection_too_many(
    endpoint: HttpEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard.GuardedProtocol, "limit_connections", 1)
    _, writer = await connect(endpoint.address)
    reply = Reply(await send(endpoint.address, b""))
    assert (reply.status, reply.error["code"]) == (503, "too_many_connections")
    writer.close()
    await writer.wait_closed()

    async def is_let_in() -> bool:
        return (await ask(endpoint.address, "/health")).status == 200

    async with asyncio.timeout(60):
        while not await is_let_in():
            pass


async def test_a_reader_too_slow_is_cut_off(
    endpoint: HttpEndpoint, frontend: NullFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "SEND_LIMIT_S", 0.2)
    frontend.script = endless
    host, _, port = endpoint.address.rpartition(":")
    with socket.create_connection((host, int(port))) as client:
        client.setblocking(False)
        await asyncio.get_running_loop().sock_sendall(client, _REQUEST)
        # It never reads.
        await wait_until(lambda: frontend.num_closed == 1)


async def test_a_half_open_client_is_probed(endpoint: HttpEndpoint) -> None:
    _, writer = await connect(endpoint.address)
    await ask(endpoint.address, "/health")
    [connection, *_] = endpoint._server.server_state.connections
    transport = connection.transport
    server_side = transport.get_extra_info("socket")
    assert server_side.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert server_side.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    writer.close()


async def test_connections_end_with_their_next_answer_when_it_leaves(
    endpoint: HttpEndpoint, frontend: NullFrontend
) -> None:
    release = asyncio.Event()

    async def held(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        yield started()
        yield chunk("a")
        await release.wait()
        yield finished()

    frontend.script = held
    idle_reader, idle_writer = await connect(endpoint.address)
    idle_writer.write(b"GET /version HTTP/1.1\r\nhost: t\r\n\r\n")
    await idle_reader.readuntil(b"}")
    reader, writer = await connect(endpoint.address)
    writer.write(_REQUEST)
    await reader.readuntil(b'"text": "a"')

    endpoint.close_after_answers()
    await endpoint.stop_accepting()

    with pytest.raises(OSError):
        await connect(endpoint.address)
    idle_writer.write(b"GET /version HTTP/1.1\r\nhost: t\r\n\r\n")
    reply = Reply(await idle_reader.read())
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    release.set()
    # Its answer had begun: the connection is kept, for as long as any other.
    await reader.readuntil(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert not reader.at_eof()
    writer.close()
    idle_writer.close()


async def test_connections_that_wait_in_the_queue_are_still_served(
    endpoint: HttpEndpoint,
) -> None:
    host, _, port = endpoint.address.rpartition(":")
    # Without a turn of the loop in between nobody accepts it.
    client = socket.create_connection((host, int(port)))
    client.sendall(b"GET /version HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n")
    await endpoint.stop_accepting()
    reader, writer = await asyncio.open_connection(sock=client)
    assert Reply(await reader.read()).status == 200
    writer.close()


async def test_clients_that_leave_things_undone_hold_up_no_end(
    frontend: NullFrontend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor is a traceback logged of what they ask for."""
    monkeypatch.setattr(guard, "LINGER_S", 0.1)
    frontend.script = endless
    async with serving(frontend) as endpoint:
        reader, writer = await connect(endpoint.address)
        writer.write(_REQUEST[: -len(_HELLO) // 2])
        host, _, port = endpoint.address.rpartition(":")
        with socket.create_connection((host, int(port))) as never_reads:
            never_reads.sendall(_REQUEST)
            open_ones = endpoint._server.server_state.connections
            connections = cast(set[guard.GuardedProtocol], open_ones)
            # The one's head has come, and the other's answer waits for it.
            await wait_until(
                lambda: len(connections) == 2 and all(each.cycle for each in connections)
            )
            await wait_until(lambda: any(each.flow.write_paused for each in connections))
            await endpoint.stop()
        reply = Reply(await reader.read())
        writer.close()
    assert (reply.status, reply.error["code"]) == (503, "draining")
    assert num_refused(frontend) == {"503": 1}
    assert frontend.num_closed == 1
    assert caplog.text == ""


@needs_ipv6
@pytest.mark.parametrize("host", ["::1", "[::1]"])
async def test_ipv6(frontend: NullFrontend, host: str) -> None:
    endpoint = new_endpoint(frontend)
    await endpoint.start(host, 0)
    port = endpoint.address.removeprefix("[::1]:")
    reader, writer = await asyncio.open_connection("::1", int(port))
    writer.write(b"GET /version HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n")
    assert Reply(await reader.read()).status == 200
    writer.close()
    await endpoint.stop()


async def test_gateways_share_a_port_only_when_told_to(frontend: NullFrontend) -> None:
    first, second = new_endpoint(frontend), new_endpoint(frontend)
    await first.start("127.0.0.1", 0, reuse_port=True)
    port = int(first.address.rpartition(":")[2])
    with pytest.raises(OSError, match=rf"cannot listen on 127.0.0.1:{port} \(--http-port\)"):
        await second.start("127.0.0.1", port)
    await second.start("127.0.0.1", port, reuse_port=True)
    await first.stop_accepting()
    await first.stop()
    for _ in range(5):
        assert (await ask(second.address, "/version")).status == 200
    await second.stop()
