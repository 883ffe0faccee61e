"""The streams under the hand-off: KvService.Hold, as owner and as reader.

Streams only; what the messages mean is handoff.py's, on the engine thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import grpc

from baton.services.worker.messages import Peer
from baton.shared.rpc.errors import BatonError, CapabilityMismatch, SourceLost, from_rpc_error
from baton.shared.rpc.serve import internal_channel
from baton.shared.rpc.streams import SILENCE_S, only_own_cancels, until_silence, with_ticks
from baton.shared.telemetry import log_event
from baton.v1 import kv_service_pb2 as kv
from baton.v1 import kv_service_pb2_grpc, types_pb2

logger = logging.getLogger(__name__)

READER_GRACE_S = 2.0
"""Claims outlive their stream that long: the reader may still be in the middle of a copy."""


class OwnerHost(Protocol):
    """What the owner's side needs of the worker that it is part of."""

    capability_hash: str
    identity: Peer

    def describe_pool(self) -> kv.PoolDescription: ...

    def attach_reader(self, name: str) -> tuple[str, asyncio.Queue[kv.HoldResponse]]: ...

    def from_reader(self, reader: str, message: kv.HoldRequest) -> None: ...

    def detach_reader(self, reader: str) -> None: ...

    def tick(self) -> types_pb2.Tick: ...


class KvServicer(kv_service_pb2_grpc.KvServiceServicer):
    """The owner's side: one call per reader."""

    def __init__(self, host: OwnerHost) -> None:
        self._host = host

    async def Hold(
        self,
        request_iterator: AsyncIterator[kv.HoldRequest],
        context: grpc.aio.ServicerContext[kv.HoldRequest, kv.HoldResponse],
    ) -> AsyncIterator[kv.HoldResponse]:
        requests = until_silence(request_iterator, 2 * SILENCE_S)
        first = await anext(requests, None)
        if first is None or not first.HasField("hello"):
            return
        if first.hello.capability_hash != self._host.capability_hash:
            raise CapabilityMismatch("model, layout or dtype differ: blocks can't be shared")
        reader, messages = self._host.attach_reader(first.hello.worker_id)
        task = asyncio.create_task(self._read(reader, requests))
        try:
            me = self._host.identity
            hello = kv.HoldHelloReply(
                worker_id=me.worker_id,
                incarnation=me.incarnation,
                pool=self._host.describe_pool(),
            )
            yield kv.HoldResponse(hello=hello)
            async for message in with_ticks(messages, self._tick):
                if task.done():
                    return
                yield message
        finally:
            task.cancel()
            loop = asyncio.get_running_loop()
            loop.call_later(READER_GRACE_S, self._host.detach_reader, reader)

    async def _read(self, reader: str, requests: AsyncIterator[kv.HoldRequest]) -> None:
        try:
            async for message in requests:
                if not message.HasField("tick"):
                    self._host.from_reader(reader, message)
        except TimeoutError:
            log_event(logger, logging.WARNING, "reader fell silent", reader=reader)

    def _tick(self) -> kv.HoldResponse:
        return kv.HoldResponse(tick=self._host.tick())


class HoldClient:
    """The reader's side: one stream to one start of one peer.

    Whatever ends it is reported once through `on_lost`, and all that was claimed on it is lost.
    """

    def __init__(
        self,
        source: Peer,
        *,
        hello: kv.HoldHello,
        on_message: Callable[[Peer, kv.HoldResponse], None],
        on_lost: Callable[[Peer, BatonError], None],
        tick: Callable[[], types_pb2.Tick],
    ) -> None:
        self.source = source
        self._messages: asyncio.Queue[kv.HoldRequest] = asyncio.Queue()
        self._messages.put_nowait(kv.HoldRequest(hello=hello))
        self._on_message = on_message
        self._on_lost = on_lost
        self._tick = tick
        self._task = asyncio.create_task(self._run())

    def send(self, message: kv.HoldRequest) -> None:
        self._messages.put_nowait(message)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        error: BatonError = SourceLost("the source closed the hand-off stream")
        try:
            async with internal_channel(self.source.address) as channel:
                stub = kv_service_pb2_grpc.KvServiceStub(channel)
                requests = with_ticks(self._messages, self._make_tick)
                with only_own_cancels():
                    await self._read(aiter(stub.Hold(requests)))
        except TimeoutError:
            error = SourceLost("the source fell silent")
        except grpc.aio.AioRpcError as rpc_error:
            error = SourceLost(from_rpc_error(rpc_error).message)
        except BatonError as failure:
            error = failure
        except Exception:
            log_event(
                logger,
                logging.ERROR,
                "hand-off stream failed",
                exc_info=True,
                source=self.source.worker_id,
            )
        log_event(
            logger,
            logging.WARNING,
            "hand-off stream ended",
            source=self.source.worker_id,
            message=error.message,
        )
        self._on_lost(self.source, error)

    async def _read(self, responses: AsyncIterator[kv.HoldResponse]) -> None:
        async for message in until_silence(responses, 2 * SILENCE_S):
            if message.HasField("hello") and message.hello.incarnation != self.source.incarnation:
                raise SourceLost("the source has been restarted")
            if not message.HasField("tick"):
                self._on_message(self.source, message)

    def _make_tick(self) -> kv.HoldRequest:
        return kv.HoldRequest(tick=self._tick())
