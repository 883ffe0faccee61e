"""The two drivers against servers that answer as they should, or do not."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from baton.loadtest.conversations import workload_of
from baton.loadtest.drivers import Driver, driver_for
from baton.loadtest.http_stream import HttpBroken, HttpClient, ResponseReader
from baton.loadtest.null_server import MODEL, NullHttp, start_grpc, start_http
from baton.loadtest.samples import Sample, Watch
from baton.loadtest.shard import Generator, Share
from baton.loadtest.spec import Load, LoadError
from baton.loadtest.sse import EventReader, EventTooLong
from baton.loadtest.target import Target, probe

Answer = Callable[["Scripted", dict[str, Any]], Awaitable[None]]


class Scripted(NullHttp):
    """A null server that answers completions as `answer` does."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._script = answer

    async def complete(self, request: dict[str, Any]) -> None:
        await self._script(self, request)

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()


@asynccontextmanager
async def null_target(scheme: str) -> AsyncIterator[str]:
    if scheme == "grpc":
        grpc_server, target = await start_grpc()
        yield target
        await grpc_server.stop(0)
    else:
        http_server, target = await start_http()
        yield target
        http_server.close()


@asynccontextmanager
async def scripted(answer: Answer) -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Scripted(answer), "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


async def asked(driver: Driver, answer: list[int] | None = None, max_tokens: int = 5) -> Sample:
    sample = Sample(0.0)
    watch = Watch(sample, time.monotonic())
    await driver.ask(driver.encode([1, 2, 3], max_tokens), watch, answer)
    return sample


async def status_of(target: str) -> tuple[str, str]:
    driver = driver_for(Target.parse(target), MODEL)
    sample = await asked(driver)
    await driver.close()
    return sample.status, sample.detail


@pytest.mark.parametrize("scheme", ["grpc", "http"])
async def test_an_answer_is_followed_message_by_message(scheme: str) -> None:
    async with null_target(scheme) as target:
        facts = await probe(Target.parse(target))
        assert facts.name == MODEL and facts.max_model_len
        driver = driver_for(Target.parse(target), facts.name)
        answer: list[int] = []
        sample = await asked(driver, answer)
        again = await asked(driver)
        await driver.close()
    assert sample.status == "OK" == again.status
    assert (sample.num_prompt_tokens, sample.num_tokens, sample.num_messages) == (3, 5, 5)
    assert len(sample.gaps_s) == 4 and sample.num_cached_tokens == 3
    assert answer == [7] * 5
    if scheme == "grpc":
        assert (sample.transfer_s, sample.num_attempts, sample.is_local) == (0.003, 1, False)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
async def test_nobody_there(scheme: str, unused_tcp_port: int) -> None:
    target = f"{scheme}://127.0.0.1:{unused_tcp_port}"
    status, _ = await status_of(target)
    assert status in ("UNAVAILABLE", "CONNECTION")
    with pytest.raises(LoadError, match="nobody answers") as raised:
        await probe(Target.parse(target))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
async def test_another_model_is_named(scheme: str) -> None:
    async with null_target(scheme) as target:
        with pytest.raises(LoadError, match="--model other: .* serves null"):
            await probe(Target.parse(target), "other")


async def test_refusals_and_broken_streams_are_statuses() -> None:
    async def refuse(server: Scripted, request: dict[str, Any]) -> None:
        error = json.dumps({"error": {"message": "too\nmany", "code": "x"}}).encode()
        server.write(b"HTTP/1.1 429 X\r\ncontent-length: %d\r\n\r\n%s" % (len(error), error))

    async def fail_inside(server: Scripted, request: dict[str, Any]) -> None:
        server.begin_stream()
        server.write_chunk(b'data: {"error": {"message": "no worker"}}\n\n')
        server.write_chunk(b"")

    async def cut(server: Scripted, request: dict[str, Any]) -> None:
        server.begin_stream()
        server.say_event([{"text": "a"}], 3, 1)
        server.close()

    async def end_early(server: Scripted, request: dict[str, Any]) -> None:
        server.begin_stream()
        server.say_event([{"text": "a"}], 3, 1)
        server.write_chunk(b"data: [DONE]\n\n")
        server.write_chunk(b"")

    async def nonsense(server: Scripted, request: dict[str, Any]) -> None:
        server.begin_stream()
        server.write_chunk(b"data: {not json\n\n")

    for script, status, detail in (
        (refuse, "HTTP 429", "too many"),
        (fail_inside, "ERROR_IN_STREAM", "no worker"),
        (cut, "CONNECTION", "the connection ended before the answer did"),
        (end_early, "CUT_SHORT", "the stream ended without a finish_reason"),
    ):
        async with scripted(script) as target:
            assert await status_of(target) == (status, detail)
    async with scripted(nonsense) as target:
        assert (await status_of(target))[0] == "NOT_OPENAI"


async def test_without_usage_a_message_with_text_is_a_token() -> None:
    async def answer(server: Scripted, request: dict[str, Any]) -> None:
        assert request["stream_options"]["continuous_usage_stats"] and request["ignore_eos"]
        server.begin_stream()
        for text, reason in (("", None), ("a", None), ("b", None), ("", "length")):
            choice = {"text": text, "finish_reason": reason}
            server.write_chunk(b"data: %s\n\n" % json.dumps({"choices": [choice]}).encode())
        server.write_chunk(b"")

    async with scripted(answer) as target:
        driver = driver_for(Target.parse(target), MODEL)
        sample = await asked(driver)
        await driver.close()
    assert (sample.status, sample.num_tokens, sample.num_messages) == ("OK", 2, 2)


async def test_an_idle_connection_that_the_server_closed_is_replaced() -> None:
    async with null_target("http") as target:
        parts = Target.parse(target)
        client = HttpClient(parts.host, parts.port)
        body = bytearray()
        assert await client.exchange(client.encode("/v1/models", None), body.extend) == 200
        (idle,) = client._idle
        idle.close()
        assert await client.exchange(client.encode("/v1/models", None), body.extend) == 200
        assert await client.exchange(client.encode("/nowhere", b"{}"), body.extend) == 404
        client.close()


@pytest.mark.parametrize("scheme", ["grpc", "http"])
async def test_a_conversation_grows_by_its_answers(scheme: str) -> None:
    async with null_target(scheme) as target:
        load = Load(
            target,
            prompt_tokens="20",
            output_tokens="4",
            num_turns=3,
            num_requests=6,
            num_streams=2,
            model=MODEL,
        )
        driver = driver_for(Target.parse(target), MODEL)
        generator = Generator(load, Share(0, 1), driver)
        await generator.run()
        await driver.close()
    assert [s.status for s in generator.samples] == ["OK"] * 6
    assert sorted(s.num_prompt_tokens for s in generator.samples) == [20, 20, 44, 44, 68, 68]


async def test_an_open_loop_sends_all_and_gives_up_what_does_not_end() -> None:
    async def hang(server: Scripted, request: dict[str, Any]) -> None:
        server.begin_stream()

    load = Load("", arrivals="constant", rate=100.0, num_requests=5, drain_s=0.05, model=MODEL)
    for is_hanging, status in ((False, "OK"), (True, "UNFINISHED")):
        context = scripted(hang) if is_hanging else null_target("http")
        async with context as target:
            driver = driver_for(Target.parse(target), MODEL)
            here = replace(load, target=target, drain_s=0.05 if is_hanging else 30.0)
            generator = Generator(here, Share(0, 1), driver)
            await generator.run()
            await driver.close()
        assert [s.status for s in generator.samples] == [status] * 5
        detail = "no end 0.05 s after the load (--drain)" if is_hanging else ""
        assert {s.detail for s in generator.samples} == {detail}
        assert [s.at_s for s in generator.samples] == workload_of(load).arrivals


async def test_a_request_has_a_limit() -> None:
    async def hang(server: Scripted, request: dict[str, Any]) -> None:
        server.begin_stream()

    async with scripted(hang) as target:
        load = Load(target, num_requests=1, timeout_s=0.05, model=MODEL)
        driver = driver_for(Target.parse(target), MODEL)
        generator = Generator(load, Share(0, 1), driver)
        await generator.run()
        await driver.close()
    assert [s.status for s in generator.samples] == ["TIMEOUT"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_chunks_are_put_together_however_they_are_cut(size: int) -> None:
    raw = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"5\r\nhello\r\nA;x=y\r\n, 12345678\r\n0\r\nTrailer: z\r\n\r\n"
    )
    reader = ResponseReader()
    body = b"".join(reader.feed(raw[at : at + size]) for at in range(0, len(raw), size))
    assert (body, reader.status, reader.is_complete) == (b"hello, 12345678", 200, True)
    assert reader.keeps_alive


def test_other_bodies_and_what_is_no_http() -> None:
    reader = ResponseReader()
    assert reader.feed(b"HTTP/1.1 500 X\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc") == (
        b"abc"
    )
    assert reader.is_complete and not reader.keeps_alive
    reader = ResponseReader()
    assert reader.feed(b"HTTP/1.0 200 OK\r\n\r\nab") == b"ab"
    assert [reader.is_complete] == [False]
    reader.eof()
    assert bool(reader.is_complete)
    for raw in (
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n",
        b"x" * (1 << 17),
    ):
        with pytest.raises(HttpBroken):
            ResponseReader().feed(raw)
    with pytest.raises(HttpBroken):
        ResponseReader().eof()


def test_events_are_lines_of_data() -> None:
    reader = EventReader()
    assert reader.feed(b"data: a\n\nda") == [b"a"]
    assert reader.feed(b"ta:b\r\n: a comment\n") == [b"b"]
    with pytest.raises(EventTooLong):
        reader.feed(b"x" * (9 << 20))


@pytest.mark.parametrize("text", ["", "ftp://a:1", "grpc://", "http://a:port", "http://a:1/other"])
def test_a_target_that_is_none(text: str) -> None:
    with pytest.raises(LoadError, match="must be grpc://HOST:PORT"):
        Target.parse(text)


def test_targets() -> None:
    assert str(Target.parse("localhost:7")) == "grpc://localhost:7"
    assert str(Target.parse("http://[::1]:8000/v1")) == "http://[::1]:8000"
    assert Target.parse("https://a").port == 443
