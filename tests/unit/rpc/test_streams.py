"""Ticks where nothing is sent, silence as loss, who cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from baton.shared.rpc import streams
from baton.shared.rpc.streams import only_own_cancels, until_silence, with_ticks


@pytest.fixture(autouse=True)
def fast_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "TICK_S", 0.01)


async def test_messages_pass_in_order_and_silence_is_filled_with_ticks() -> None:
    queue: asyncio.Queue[str] = asyncio.Queue()
    for message in "ab":
        queue.put_nowait(message)
    stream = with_ticks(queue, lambda: "tick")
    assert [await anext(stream) for _ in range(4)] == ["a", "b", "tick", "tick"]
    queue.put_nowait("c")
    assert await anext(stream) == "c"


async def test_a_tick_tells_the_state_of_its_own_moment() -> None:
    steps = iter(range(10))
    queue: asyncio.Queue[int] = asyncio.Queue()
    stream = with_ticks(queue, lambda: next(steps))
    assert [await anext(stream) for _ in range(3)] == [0, 1, 2]


async def test_no_message_is_lost_at_the_moment_of_a_tick() -> None:
    """A producer about as slow as the ticks, so that they meet all the time."""
    queue: asyncio.Queue[int] = asyncio.Queue()

    async def produce() -> None:
        for number in range(40):
            await asyncio.sleep(0.01)
            queue.put_nowait(number)

    producer = asyncio.create_task(produce())
    received: list[int] = []
    async for message in with_ticks(queue, lambda: -1):
        if message >= 0:
            received.append(message)
        if message == 39:
            break
    await producer
    assert received == list(range(40))


async def script(*items: str | float) -> AsyncIterator[str]:
    """Strings are sent, numbers waited."""
    for item in items:
        if isinstance(item, str):
            yield item
        else:
            await asyncio.sleep(item)


async def test_a_stream_passes_to_its_end() -> None:
    assert [message async for message in until_silence(script("a", 0.0, "b"), 5.0)] == ["a", "b"]


async def test_silence_is_an_error_and_what_came_before_it_is_there() -> None:
    received: list[str] = []
    with pytest.raises(TimeoutError):
        async for message in until_silence(script("a", "b", 60.0, "c"), 0.02):
            received.append(message)
    assert received == ["a", "b"]


async def test_only_silence_counts_not_the_length_of_the_stream() -> None:
    items: list[str | float] = ["a", 0.02]
    slow = until_silence(script(*items * 10), 1.0)
    assert len([message async for message in slow]) == 10


async def test_the_reader_may_take_its_time() -> None:
    """The clock runs while the stream is waited for, not while a message is dealt with."""
    received: list[str] = []
    async for message in until_silence(script("a", "b"), 0.02):
        await asyncio.sleep(0.05)
        received.append(message)
    assert received == ["a", "b"]


async def test_errors_of_the_stream_get_through() -> None:
    async def broken() -> AsyncIterator[str]:
        yield "a"
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        _ = [message async for message in until_silence(broken(), 5.0)]


async def cancelled_call() -> AsyncIterator[str]:
    """As a call of gRPC that was cancelled under its reader."""
    yield "a"
    raise asyncio.CancelledError


async def test_a_call_that_was_cancelled_is_an_error_of_the_call() -> None:
    received: list[str] = []
    with pytest.raises(grpc.aio.AioRpcError) as caught, only_own_cancels():
        async for message in until_silence(cancelled_call(), 5.0):
            received.append(message)
    assert received == ["a"] and caught.value.code() is grpc.StatusCode.CANCELLED
    task = asyncio.current_task()
    assert task is not None and not task.cancelling()


async def test_a_task_that_was_cancelled_stays_so() -> None:
    async def read() -> None:
        with only_own_cancels():
            async for _ in script("a", 60.0):
                reading.set()

    reading = asyncio.Event()
    task = asyncio.create_task(read())
    await reading.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_a_timeout_around_or_within_stays_one() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            with only_own_cancels():
                await asyncio.Event().wait()
    with pytest.raises(TimeoutError), only_own_cancels():
        async for _ in until_silence(script(60.0), 0.01):
            pass
