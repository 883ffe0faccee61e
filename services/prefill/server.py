"""PrefillService: a call is a prompt's host; its events come from the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

import grpc

from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.rpc.convert import sequence_from_pb
from baton.shared.rpc.errors import BatonError
from baton.shared.rpc.streams import with_ticks
from baton.v1 import prefill_service_pb2, prefill_service_pb2_grpc, types_pb2

PrefillEvents = asyncio.Queue[prefill_service_pb2.PrefillResponse | BatonError]


class PrefillHost(Protocol):
    """What the service needs of the worker that it is part of."""

    capability_hash: str

    def start_prefill(self, sequence: Sequence, *, unclaimed: bool) -> PrefillEvents: ...

    def end_prefill(self, key: AttemptKey, *, cancel: bool) -> None: ...

    def tick(self) -> types_pb2.Tick: ...


class PrefillServicer(prefill_service_pb2_grpc.PrefillServiceServicer):
    def __init__(self, host: PrefillHost) -> None:
        self._host = host

    async def Prefill(
        self,
        request: prefill_service_pb2.PrefillRequest,
        context: grpc.aio.ServicerContext[
            prefill_service_pb2.PrefillRequest, prefill_service_pb2.PrefillResponse
        ],
    ) -> AsyncIterator[prefill_service_pb2.PrefillResponse]:
        sequence = sequence_from_pb(request.sequence, self._host.capability_hash)
        events = self._host.start_prefill(sequence, unclaimed=request.unclaimed)
        has_ended = False
        try:
            async for event in with_ticks(events, self._tick):
                if isinstance(event, BatonError):
                    has_ended = True
                    raise event
                has_ended = event.HasField("first_token")
                yield event
                if has_ended:
                    return
        finally:
            self._host.end_prefill(sequence.key, cancel=not has_ended)

    def _tick(self) -> prefill_service_pb2.PrefillResponse | BatonError:
        return prefill_service_pb2.PrefillResponse(tick=self._host.tick())
