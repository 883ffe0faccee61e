"""A stream that is at work before it is read is closed, whoever stops reading when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from baton.services.gateway.merged import begun


class Source:
    def __init__(self, num_messages: int, error: Exception | None = None) -> None:
        self.said: list[str] = []
        self.may_go_on = asyncio.Event()
        self._num_messages, self._error = num_messages, error

    async def messages(self) -> AsyncGenerator[int, None]:
        try:
            self.said.append("begun")
            await self.may_go_on.wait()
            for number in range(self._num_messages):
                yield number
            if self._error is not None:
                raise self._error
        finally:
            self.said.append("closed")


async def test_it_is_at_work_before_it_is_read() -> None:
    source = Source(3)
    async with begun(source.messages()) as messages:
        assert source.said == ["begun"]
        source.may_go_on.set()
        assert [message async for message in messages] == [0, 1, 2]
    assert source.said == ["begun", "closed"]


@pytest.mark.parametrize("num_read", [0, 1, 2])
async def test_who_stops_reading_closes_it(num_read: int) -> None:
    source = Source(2)
    async with begun(source.messages()) as messages:
        if num_read:
            source.may_go_on.set()
        for number in range(num_read):
            assert await anext(messages) == number
    assert source.said == ["begun", "closed"]


@pytest.mark.parametrize("num_before", [0, 1])
async def test_its_error_comes_behind_its_messages(num_before: int) -> None:
    source = Source(num_before, ValueError("no"))
    source.may_go_on.set()
    with pytest.raises(ValueError, match="no"):
        async with begun(source.messages()) as messages:
            assert [await anext(messages) for _ in range(num_before)] == [*range(num_before)]
            await anext(messages)
    assert source.said == ["begun", "closed"]


async def test_a_reader_that_is_cancelled_cancels_it() -> None:
    source = Source(1)

    async def read() -> None:
        async with begun(source.messages()) as messages:
            await anext(messages)

    reader = asyncio.create_task(read())
    while not source.said:
        await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert source.said == ["begun", "closed"]


@pytest.mark.parametrize("has_read", [False, True])
async def test_a_reader_that_is_cancelled_twice_leaves_it_closed(has_read: bool) -> None:
    """The second time while the source still ends."""
    may_end, ends, is_waiting = asyncio.Event(), asyncio.Event(), asyncio.Event()
    said: list[str] = []

    async def source() -> AsyncGenerator[int, None]:
        try:
            if has_read:
                yield 0
            await asyncio.Event().wait()
        finally:
            ends.set()
            await may_end.wait()
            said.append("closed")

    async def read() -> None:
        async with begun(source()) as messages:
            if has_read:
                await anext(messages)
            is_waiting.set()
            await (asyncio.Event().wait() if has_read else anext(messages))

    reader = asyncio.create_task(read())
    for seen in (is_waiting, ends):
        await seen.wait()
        await asyncio.sleep(0)
        reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert said == []
    may_end.set()
    async with asyncio.timeout(10):
        while not said:
            await asyncio.sleep(0)
