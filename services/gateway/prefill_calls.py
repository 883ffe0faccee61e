"""Prefill calls, some of them made before there is a prompt.

Setting a call up takes longer than a prompt's way through it. A call of one request is its head,
and then a message: so the head of the next ones is sent while nobody waits for it. To the worker
they are calls like any other, whose request has not come yet.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

import grpc

from baton.v1.prefill_service_pb2 import PrefillRequest, PrefillResponse

_METHOD = "/baton.v1.PrefillService/Prefill"
_NUM_SPARE = 8
_SPARE_AFTER_S = 0.02
"""So long after a call was taken another one takes its place: not while its prompt is sent."""

PrefillCall = grpc.aio.StreamStreamCall[PrefillRequest, PrefillResponse]


class PrefillCalls:
    """To one start of a worker."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._open: Callable[[], PrefillCall] = channel.stream_stream(
            _METHOD,
            request_serializer=_serialized,
            response_deserializer=PrefillResponse.FromString,
        )
        self._spare: deque[PrefillCall] = deque()
        self._filling: asyncio.TimerHandle | None = None
        self._is_closed = False

    @property
    def num_spare(self) -> int:
        return len(self._spare)

    def fill(self) -> None:
        """Makes calls until there are some to spare; none any more once closed."""
        if self._filling is not None:
            self._filling.cancel()
            self._filling = None
        if self._is_closed:
            return
        self._spare = deque(call for call in self._spare if not call.done())
        while len(self._spare) < _NUM_SPARE:
            self._spare.append(self._open())

    def take(self) -> PrefillCall:
        """A call for one request, which is the taker's to cancel."""
        if self._filling is None:
            self._filling = asyncio.get_running_loop().call_later(_SPARE_AFTER_S, self.fill)
        while self._spare:
            call = self._spare.popleft()
            if not call.done():
                return call
        return self._open()

    def close(self) -> None:
        """Calls that were taken go on."""
        self._is_closed = True
        for call in self._spare:
            call.cancel()
        self._spare.clear()


def _serialized(request: PrefillRequest) -> bytes:
    return request.SerializeToString()


async def ask(call: PrefillCall, request: PrefillRequest) -> AsyncIterator[PrefillResponse]:
    """The answers to the call's one request. Raises as reading a call does."""
    await call.write(request)
    await call.done_writing()
    async for response in call:
        yield response
