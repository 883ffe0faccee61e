"""DecodeService: one stream per gateway, all of its sequences on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Protocol

import grpc

from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.rpc.convert import key_from_pb, sequence_from_pb
from baton.shared.rpc.errors import CapabilityMismatch, to_failure
from baton.shared.rpc.streams import SILENCE_S, until_silence, with_ticks
from baton.shared.telemetry import log_event
from baton.v1 import decode_service_pb2, decode_service_pb2_grpc, types_pb2

logger = logging.getLogger(__name__)

DecodeEvents = asyncio.Queue[decode_service_pb2.DecodeResponse]


class DecodeHost(Protocol):
    """What the service needs of the worker that it is part of."""

    capability_hash: str

    def attach_gateway(self, incarnation: str) -> tuple[str, DecodeEvents]:
        """A new stream: its name here, and what is to be sent on it."""

    def detach_gateway(self, gateway: str) -> None:
        """The stream is gone, and with it its sequences."""

    def start_decode(
        self,
        sequence: Sequence,
        gateway: str,
        number: int,
        source: types_pb2.WorkerAddress | None,
    ) -> None: ...

    def cancel(self, key: AttemptKey) -> None: ...

    def tick(self) -> types_pb2.Tick: ...


class DecodeServicer(decode_service_pb2_grpc.DecodeServiceServicer):
    def __init__(self, host: DecodeHost) -> None:
        self._host = host

    async def Decode(
        self,
        request_iterator: AsyncIterator[decode_service_pb2.DecodeRequest],
        context: grpc.aio.ServicerContext[
            decode_service_pb2.DecodeRequest, decode_service_pb2.DecodeResponse
        ],
    ) -> AsyncIterator[decode_service_pb2.DecodeResponse]:
        requests = until_silence(request_iterator, 2 * SILENCE_S)
        first = await anext(requests, None)
        if first is None or not first.HasField("hello"):
            return
        gateway, events = self._host.attach_gateway(first.hello.gateway_incarnation)
        reader = asyncio.create_task(self._read(gateway, events, requests))
        try:
            async for event in with_ticks(events, self._tick):
                if reader.done():
                    return
                yield event
        finally:
            reader.cancel()
            self._host.detach_gateway(gateway)

    async def _read(
        self,
        gateway: str,
        events: DecodeEvents,
        requests: AsyncIterator[decode_service_pb2.DecodeRequest],
    ) -> None:
        """Until the gateway closes the stream or falls silent."""
        try:
            async for message in requests:
                match message.WhichOneof("message"):
                    case "start":
                        self._start(gateway, events, message.start)
                    case "cancel":
                        self._host.cancel(key_from_pb(message.cancel.key))
        except TimeoutError:
            log_event(logger, logging.WARNING, "gateway stream fell silent", stream=gateway)

    def _start(
        self, gateway: str, events: DecodeEvents, start: decode_service_pb2.StartSequence
    ) -> None:
        try:
            sequence = sequence_from_pb(start.sequence, self._host.capability_hash)
        except CapabilityMismatch as error:
            failed = decode_service_pb2.SequenceFailed(
                slot=start.slot, key=start.sequence.key, failure=to_failure(error)
            )
            events.put_nowait(decode_service_pb2.DecodeResponse(failed=failed))
            return
        source = start.source if start.HasField("source") else None
        self._host.start_decode(sequence, gateway, start.slot, source)

    def _tick(self) -> decode_service_pb2.DecodeResponse:
        return decode_service_pb2.DecodeResponse(tick=self._host.tick())
