"""Long-lived streams: they tick, so that silence means loss.

Every internal stream carries something at least every `TICK_S`. The asyncio thread sees to that, so
silence means that the process or the path is gone, not that the engine is busy.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc

TICK_S = 0.25
SILENCE_S = 1.0
"""A silence of that length counts as loss; with each fruitless attempt of a request it doubles."""

T = TypeVar("T")


async def with_ticks(queue: asyncio.Queue[T], tick: Callable[[], T]) -> AsyncIterator[T]:
    """What comes through the queue, and a tick every `TICK_S`.

    One timer for the stream: a timeout per message would cost as much as the message.
    """
    loop = asyncio.get_running_loop()

    timer = loop.call_later(TICK_S, lambda: put_tick())

    def put_tick() -> None:
        nonlocal timer
        queue.put_nowait(tick())
        timer = loop.call_later(TICK_S, put_tick)

    try:
        while True:
            yield await queue.get()
    finally:
        timer.cancel()


async def until_silence(stream: AsyncIterator[T], silence_s: float) -> AsyncIterator[T]:
    """What the stream brings, until its end. Raises TimeoutError after `silence_s` without a
    message."""
    while True:
        try:
            async with asyncio.timeout(silence_s):
                message = await anext(stream)
        except StopAsyncIteration:
            return
        yield message


@contextmanager
def only_own_cancels() -> Iterator[None]:
    """A context for reading a call, in which CancelledError means that the reading task was
    cancelled.

    gRPC raises CancelledError also when the call was cancelled while it was read: because its
    channel was closed, or by gRPC itself when the stream of requests broke. Here that raises
    AioRpcError with status CANCELLED, as when the server ends the call with it.
    """
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise grpc.aio.AioRpcError(
            grpc.StatusCode.CANCELLED,
            initial_metadata=grpc.aio.Metadata(),
            trailing_metadata=grpc.aio.Metadata(),
            details="the call was cancelled under its reader",
        ) from None
