"""Long-lived streams: they tick, so that silence means loss.

Every internal stream carries something at least each `TICK_S`, from the asyncio thread, so that
silence means a process or path that is gone, not an engine that is busy.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc

TICK_S = 0.25
SILENCE_S = 1.0
"""Silence that long counts as loss; doubled with every fruitless attempt of a request."""

T = TypeVar("T")


async def with_ticks(queue: asyncio.Queue[T], tick: Callable[[], T]) -> AsyncIterator[T]:
    """What comes through the queue, and a tick each `TICK_S`.

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
    """What the stream brings, to its end; raises TimeoutError after `silence_s` without."""
    while True:
        try:
            async with asyncio.timeout(silence_s):
                message = await anext(stream)
        except StopAsyncIteration:
            return
        yield message


@contextmanager
def only_own_cancels() -> Iterator[None]:
    """Around the reading of a call: CancelledError means that the reading task was cancelled.

    gRPC raises it also when the call was cancelled under its reader: with its channel, or by gRPC
    itself when the stream of requests broke. That raises AioRpcError with status CANCELLED, as a
    server that ends the call so does.
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
