"""Who ends an answer, and what the other side sees of it."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable

import grpc
import pytest
from baton_client import (
    AnswerStream,
    AsyncAnswerStream,
    AsyncClient,
    Cancelled,
    Client,
    RetryPolicy,
    Unavailable,
)

from tests.client.asking import FAST
from tests.client.proxy import CuttingProxy
from tests.client.scripted import TOKEN_IDS, ScriptedGateway, Try, aborts, hangs

HANGING = Try(4, hangs)
BROKEN = Try(3, aborts(grpc.StatusCode.UNAVAILABLE))
PATIENT = RetryPolicy(first_backoff_s=3600, max_backoff_s=3600)


def when_hanging(
    gateway: ScriptedGateway, stream: AnswerStream, act: Callable[[], None]
) -> threading.Thread:
    """Does `act` once the gateway waits for the client to end the call, and all that it has sent
    has come: what is still on its way when a call is cancelled, gRPC drops."""

    def wait_and_act() -> None:
        assert gateway.hanging.wait(60)
        give_up_at = time.monotonic() + 60
        while len(stream.token_ids) < 4 and time.monotonic() < give_up_at:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


@pytest.mark.parametrize("who", ["stream", "client"])
def test_cancel_from_another_thread(who: str) -> None:
    with ScriptedGateway(HANGING) as gateway, Client(gateway.address, retry=FAST) as client:
        stream = client.generate("x")
        thread = when_hanging(gateway, stream, stream.cancel if who == "stream" else client.close)
        with pytest.raises(Cancelled):
            stream.result()
        thread.join()
        assert gateway.let_go.wait(60)
        assert stream.token_ids == TOKEN_IDS[:4]
        with pytest.raises(Cancelled):  # and stays so
            next(stream)


def test_cancel_ends_the_wait_before_a_retry() -> None:
    with ScriptedGateway(BROKEN) as gateway, Client(gateway.address, retry=PATIENT) as client:
        stream = client.generate("x")
        for chunk in stream:
            if chunk.token_ids[-1] == TOKEN_IDS[2]:
                break
        timer = threading.Timer(0.2, stream.cancel)
        timer.start()
        with pytest.raises(Cancelled):
            next(stream)
        timer.join()


def test_leaving_the_block_cancels() -> None:
    with ScriptedGateway(HANGING) as gateway, Client(gateway.address) as client:
        with client.generate("x") as stream:
            next(stream)
        assert gateway.let_go.wait(60)


def test_dropping_it_cancels() -> None:
    with ScriptedGateway(HANGING) as gateway, Client(gateway.address) as client:
        for _ in client.generate("x"):
            break
        gc.collect()
        assert gateway.let_go.wait(60)


def test_closed_client_says_so() -> None:
    with ScriptedGateway() as gateway:
        client = Client(gateway.address)
        stream = client.generate("x")
        assert stream.result().token_ids == TOKEN_IDS
        client.close()
        client.close()
        assert stream.result().token_ids == TOKEN_IDS  # what has ended stays
        for ask in (lambda: client.generate("x"), client.model_info, client.wait_ready):
            with pytest.raises(Cancelled):
                ask()


async def wait_hanging(gateway: ScriptedGateway, stream: AsyncAnswerStream) -> None:
    for _ in range(3):
        await anext(stream)
    assert await asyncio.to_thread(gateway.hanging.wait, 60)


@pytest.mark.parametrize("who", ["stream", "client"])
async def test_cancel_from_another_task(who: str) -> None:
    with ScriptedGateway(HANGING) as gateway:
        async with AsyncClient(gateway.address, retry=FAST) as client:
            stream = client.generate("x")
            await wait_hanging(gateway, stream)
            reader = asyncio.create_task(stream.result())
            await asyncio.sleep(0)
            if who == "stream":
                stream.cancel()
            else:
                await client.close()
            with pytest.raises(Cancelled):
                await reader
            assert await asyncio.to_thread(gateway.let_go.wait, 60)
            with pytest.raises(Cancelled):
                await anext(stream)


async def test_cancelled_task_is_not_mistaken() -> None:
    """gRPC raises the same for a task that is cancelled as for a call that another task ends."""
    with ScriptedGateway(HANGING) as gateway:
        async with AsyncClient(gateway.address, retry=FAST) as client:
            stream = client.generate("x")
            await wait_hanging(gateway, stream)
            reader = asyncio.create_task(stream.result())
            await asyncio.sleep(0)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            assert await asyncio.to_thread(gateway.let_go.wait, 60)
            assert len(gateway.requests) == 1


async def test_timeout_of_the_caller_is_its_own() -> None:
    with ScriptedGateway(HANGING) as gateway:
        async with AsyncClient(gateway.address, retry=FAST) as client:
            stream = client.generate("x")
            await wait_hanging(gateway, stream)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await stream.result()
            assert await asyncio.to_thread(gateway.let_go.wait, 60)


async def test_cancel_ends_the_wait_before_a_retry_async() -> None:
    with ScriptedGateway(BROKEN) as gateway:
        async with AsyncClient(gateway.address, retry=PATIENT) as client:
            stream = client.generate("x")
            asyncio.get_running_loop().call_later(0.2, stream.cancel)
            with pytest.raises(Cancelled):
                await stream.result()


async def test_leaving_the_block_cancels_async() -> None:
    with ScriptedGateway(HANGING) as gateway:
        async with AsyncClient(gateway.address) as client:
            async with client.generate("x") as stream:
                await wait_hanging(gateway, stream)
            assert await asyncio.to_thread(gateway.let_go.wait, 60)


async def test_server_that_cancels_a_question_is_asked_again() -> None:
    with ScriptedGateway() as gateway:
        gateway.unary_endings = [aborts(grpc.StatusCode.CANCELLED)]
        async with AsyncClient(gateway.address, retry=FAST) as client:
            assert (await client.model_info()).model_name == "scripted"
        assert len(gateway.requests) == 2


async def test_closed_async_client_says_so() -> None:
    client = AsyncClient("127.0.0.1:1")
    await client.close()
    with pytest.raises(Cancelled):
        client.generate("x")
    for ask in (client.model_info, client.wait_ready):
        with pytest.raises(Cancelled):
            await ask()


def test_async_client_made_before_its_loop() -> None:
    with ScriptedGateway() as gateway:
        client = AsyncClient(gateway.address)

        async def ask() -> tuple[int, ...]:
            async with client:
                return (await client.generate("x").result()).token_ids

        assert asyncio.run(ask()) == TOKEN_IDS


def test_silent_network_is_noticed() -> None:
    """By keepalive: no byte says that the peer is gone."""
    names = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
    fast = [(name, 300) for name in names]
    with (
        ScriptedGateway() as gateway,
        CuttingProxy(gateway.address, cut_after=[250], silently=True) as proxy,
        Client(proxy.address, retry=FAST, options=fast) as client,
    ):
        assert client.generate("x").result().token_ids == TOKEN_IDS
        assert proxy.num_cut == 1


def test_nobody_there() -> None:
    with Client("127.0.0.1:1", retry=FAST) as client, pytest.raises(Unavailable):
        client.generate("x").text()
