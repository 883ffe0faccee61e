"""Several streams as one, as fast as it is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

_T = TypeVar("_T")

_NUM_WAITING = 16
"""So many messages of several streams wait for a slow reader; further ones wait before them."""


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
