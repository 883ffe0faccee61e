"""Several streams as one, as fast as it is read; one that is at work before it is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

_T = TypeVar("_T")

_NUM_WAITING = 16
"""So many messages of several streams wait for a slow reader; further ones wait before them."""
_TURNS = 4
"""Of the loop, after which calls that were made at once have been sent."""


async def merged(
    sources: Sequence[AsyncGenerator[_T, None]],
) -> AsyncGenerator[tuple[int, _T], None]:
    """The messages of all sources, each with its source's index. An error of one ends them all."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as source:
            async for message in source:
                yield 0, message
        return
    queue: asyncio.Queue[tuple[int, _T] | Exception | None] = asyncio.Queue(_NUM_WAITING)

    async def follow(index: int, source: AsyncGenerator[_T, None]) -> None:
        try:
            async with aclosing(source):
                async for message in source:
                    await queue.put((index, message))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(follow(*numbered)) for numbered in enumerate(sources)]
    num_open = len(tasks)
    try:
        while num_open:
            taken = await queue.get()
            if isinstance(taken, Exception):
                raise taken
            if taken is None:
                num_open -= 1
            else:
                yield taken
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def begun(source: AsyncGenerator[_T, None]) -> AsyncIterator[AsyncGenerator[_T, None]]:
    """The messages of the source, which is at work on the first of them from now on; it is closed
    at the end, also of a reader who is cancelled twice: then while that one is gone already."""
    first = asyncio.ensure_future(anext(source, None))

    async def messages() -> AsyncGenerator[_T, None]:
        message = await asyncio.shield(first)
        if message is not None:
            yield message
            async for message in source:
                yield message

    try:
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        async with aclosing(messages()) as rest:
            yield rest
    finally:
        closing = asyncio.create_task(_close(first, source))
        _closings.add(closing)
        closing.add_done_callback(_closings.discard)
        await asyncio.shield(closing)


_closings: set[asyncio.Task[None]] = set()
"""The loop keeps no task by itself."""


async def _close(first: asyncio.Future[_T | None], source: AsyncGenerator[_T, None]) -> None:
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await source.aclose()
