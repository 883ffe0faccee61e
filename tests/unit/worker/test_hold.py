"""How a hand-off stream ends for its reader: a real server on loopback, a scripted owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc
import pytest

from baton.services.worker.hold import HoldClient
from baton.services.worker.messages import Peer
from baton.shared.rpc.errors import BatonError, CapabilityMismatch, SourceLost
from baton.shared.rpc.serve import INTERNAL_MESSAGE_BYTES, Endpoint
from baton.v1 import kv_service_pb2 as kv
from baton.v1 import kv_service_pb2_grpc, types_pb2

Context = grpc.aio.ServicerContext[Any, Any]
Ending = Callable[["Owner", Context], Awaitable[None]]


async def cancels(owner: Owner, context: Context) -> None:
    await context.abort(grpc.StatusCode.CANCELLED, "of the server's own")


async def breaks(owner: Owner, context: Context) -> None:
    await context.abort(grpc.StatusCode.UNAVAILABLE, "going down")


async def refuses(owner: Owner, context: Context) -> None:
    raise CapabilityMismatch("another model")


async def returns(owner: Owner, context: Context) -> None:
    """OK, as an owner whose reader fell silent."""


async def hangs(owner: Owner, context: Context) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        owner.let_go.set()


class Owner(kv_service_pb2_grpc.KvServiceServicer):
    """Says hello, and ends its calls as `ending` does."""

    def __init__(self) -> None:
        self.ending: Ending = hangs
        self.incarnation = "owner-1"
        self.let_go = asyncio.Event()

    async def Hold(
        self, request_iterator: AsyncIterator[kv.HoldRequest], context: Context
    ) -> AsyncIterator[kv.HoldResponse]:
        await anext(request_iterator)
        hello = kv.HoldHelloReply(worker_id="prefill-0", incarnation=self.incarnation)
        yield kv.HoldResponse(hello=hello)
        await self.ending(self, context)


@asynccontextmanager
async def serving(owner: Owner) -> AsyncIterator[Peer]:
    endpoint = Endpoint(max_message_bytes=INTERNAL_MESSAGE_BYTES)
    kv_service_pb2_grpc.add_KvServiceServicer_to_server(owner, endpoint.server)
    await endpoint.start("127.0.0.1", 0, [])
    try:
        yield Peer("prefill-0", "owner-1", endpoint.address)
    finally:
        await endpoint.stop(0)


class Reader:
    def __init__(self, source: Peer) -> None:
        self.greeted = asyncio.Event()
        self.lost: asyncio.Queue[BatonError] = asyncio.Queue()
        self.client = HoldClient(
            source,
            hello=kv.HoldHello(worker_id="decode-0"),
            on_message=lambda peer, message: self.greeted.set(),
            on_lost=lambda peer, error: self.lost.put_nowait(error),
            tick=types_pb2.Tick,
        )

    async def the_loss(self) -> BatonError:
        """Reported once, by a task that has come to its end."""
        async with asyncio.timeout(30):
            error = await self.lost.get()
            await self.client._task
        assert self.lost.empty()
        return error


@pytest.mark.parametrize("ending", [cancels, breaks, refuses, returns])
async def test_whatever_ends_the_stream_is_a_lost_source(ending: Ending) -> None:
    owner = Owner()
    owner.ending = ending
    async with serving(owner) as source:
        assert isinstance(await Reader(source).the_loss(), SourceLost)


async def test_an_owner_that_stops_is_a_lost_source() -> None:
    async with serving(Owner()) as source:
        reader = Reader(source)
        await asyncio.wait_for(reader.greeted.wait(), 30)
    assert isinstance(await reader.the_loss(), SourceLost)


async def test_an_owner_that_was_restarted_is_a_lost_source() -> None:
    owner = Owner()
    owner.incarnation = "owner-2"
    async with serving(owner) as source:
        error = await Reader(source).the_loss()
    assert isinstance(error, SourceLost) and "restarted" in error.message


async def test_a_stream_that_grpc_cancels_by_itself_is_a_lost_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It does when the stream of requests breaks. Nobody cancelled the task that reads."""

    async def get() -> NoReturn:
        raise RuntimeError("a bug")

    async with serving(Owner()) as source:
        reader = Reader(source)
        await asyncio.wait_for(reader.greeted.wait(), 30)
        monkeypatch.setattr(reader.client._messages, "get", get)
        error = await reader.the_loss()
    assert isinstance(error, SourceLost) and "CANCELLED" in error.message


async def test_a_client_that_is_closed_says_nothing() -> None:
    owner = Owner()
    async with serving(owner) as source:
        reader = Reader(source)
        await asyncio.wait_for(reader.greeted.wait(), 30)
        await reader.client.close()
        assert reader.lost.empty()
        await asyncio.wait_for(owner.let_go.wait(), 30)
