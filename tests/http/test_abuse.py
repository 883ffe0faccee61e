"""Clients that misbehave, while another one's requests complete; nothing of them stays."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import openai
import pytest

from tests.e2e.harness import Stack
from tests.unit.gateway.null_frontend import Reply, ask, connect, send

pytestmark = pytest.mark.e2e

_COMPLETIONS = "/v1/completions"
_LONG = {"prompt": "In the beginning", "max_tokens": 2000, "ignore_eos": True}
_GROWTH_MIB = 64
"""What a gateway's memory may grow by under any abuse here."""


@pytest.fixture
async def client(http: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"http://{http}/v1", api_key="none", max_retries=0
    ) as client:
        yield client


async def malformed(http: str) -> None:
    for body in (b"{", b'{"prompt": }', b"\xff" * 1000):
        assert (await ask(http, _COMPLETIONS, body)).status == 400
    reply = Reply(await send(http, b"\x00\x01\x02\r\n\r\n"))
    assert reply.status == 400


async def nested(http: str) -> None:
    body = b'{"prompt": ' + b"[" * 1_000_000
    assert (await ask(http, _COMPLETIONS, body)).status == 400


async def giant_headers(http: str) -> None:
    head = b"GET /health HTTP/1.1\r\nhost: t\r\nx: " + b"a" * (64 << 10)
    assert Reply(await send(http, head)).status == 431


async def giant_prompt(http: str) -> None:
    body = json.dumps({"prompt": "a" * (10 << 20)}).encode()
    assert (await ask(http, _COMPLETIONS, body)).status == 413
    # Within the body's limit, beyond the prompt's.
    reply = await ask(http, _COMPLETIONS, {"prompt": "a " * (1 << 20)})
    assert (reply.status, reply.error["param"]) == (400, "prompt")


async def many_small_objects(http: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}] * 80_000}
    reply = await ask(http, "/v1/chat/completions", body)
    assert (reply.status, reply.error["param"]) == (400, "messages")


async def half_open(http: str) -> None:
    """A hundred that never say what they want, or only half of it."""
    writers = []
    for index in range(100):
        _, writer = await connect(http)
        if index % 2:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 99\r\n\r\n{")
        writers.append(writer)
    for writer in writers:
        writer.transport.abort()


async def slow_reader(http: str) -> None:
    """Asks much, reads nothing, and leaves without a word."""
    body = json.dumps({**_LONG, "prompt": ["a"] * 8, "stream": True}).encode()
    head = f"POST {_COMPLETIONS} HTTP/1.1\r\nhost: t\r\ncontent-length: {len(body)}\r\n\r\n"
    client = socket.create_connection(_pair(http))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with client:
        client.sendall(head.encode() + body)
        await asyncio.sleep(0.5)  # the length of the abuse; nothing depends on it


@pytest.mark.parametrize(
    "abuse",
    [
        malformed,
        nested,
        giant_headers,
        giant_prompt,
        many_small_objects,
        half_open,
        slow_reader,
    ],
)
async def test_others_are_served_meanwhile(
    http: str,
    stack: Stack,
    client: openai.AsyncOpenAI,
    abuse: Callable[[str], Awaitable[None]],
) -> None:
    expected = stack.generate("In the beginning", max_tokens=16, ignore_eos=False).text
    before_mib = _rss_mib(stack)
    task = asyncio.ensure_future(abuse(http))
    num_answers = 0
    while not task.done() or not num_answers:
        answer = await client.completions.create(
            model="demo", prompt="In the beginning", max_tokens=16, temperature=0
        )
        assert answer.choices[0].text == expected
        num_answers += 1
    await task
    assert _rss_mib(stack) - before_mib < _GROWTH_MIB
    stack.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_disconnects_frees_its_sequence(
    http: str, stack: Stack, stream: bool
) -> None:
    before = stack.status().counters.num_cancelled
    body = json.dumps({**_LONG, "stream": stream}).encode()
    head = f"POST {_COMPLETIONS} HTTP/1.1\r\nhost: t\r\ncontent-length: {len(body)}\r\n\r\n"
    _, writer = await connect(http)
    writer.write(head.encode() + body)
    await asyncio.to_thread(
        stack.wait_until, lambda: any(s.num_running for s in map(stack.state, ["d0"]))
    )
    writer.transport.abort()
    await asyncio.to_thread(stack.assert_idle)
    assert stack.status().counters.num_cancelled == before + 1


def _pair(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def _rss_mib(stack: Stack) -> float:
    status = Path(f"/proc/{stack.processes['gateway'].popen.pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) / 1024
