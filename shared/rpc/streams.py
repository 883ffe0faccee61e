"""Long-lived streams: a tick whenever nothing else was sent, silence as loss.

Every internal stream carries something at least each `TICK_S`, from the asyncio thread, so that
silence means a process or path that is gone, not an engine that is busy.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

TICK_S = 0.25
SILENCE_S = 1.0
"""Silence that long counts as loss; doubled with every attempt where an attempt hangs on it."""

T = TypeVar("T")


async def with_ticks(queue: asyncio.Queue[T], tick: Callable[[], T]) -> AsyncIterator[T]:
    """What comes through the queue, and a tick for every `TICK_S` without."""
    while True:
        try:
            async with asyncio.timeout(TICK_S):
                message = await queue.get()
        except TimeoutError:
            message = tick()
        yield message


async def until_silence(stream: AsyncIterator[T], silence_s: float) -> AsyncIterator[T]:
    """What the stream brings, to its end; raises TimeoutError after `silence_s` without."""
    while True:
        try:
            async with asyncio.timeout(silence_s):
                message = await anext(stream)
        except StopAsyncIteration:
            return
        yield message
