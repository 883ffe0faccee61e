"""A network that falls silent, as when a cable is pulled: both ends of a call must find out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc
import pytest

from baton.shared.rpc import serve
from baton.shared.rpc.serve import Endpoint, channel_options
from baton.v1 import prefill_service_pb2 as pb
from baton.v1 import prefill_service_pb2_grpc

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[pb.PrefillRequest, pb.PrefillResponse]

LIMIT_S = 30.0
"""Half of what gRPC itself gives a ping that measures."""


class Valve:
    """A TCP proxy on loopback. Once `is_shut`, nothing passes, not even the end of a connection."""

    def __init__(self, target: str) -> None:
        self.is_shut = False
        self._host, _, self._port = target.rpartition(":")
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    async def open(self) -> str:
        """The address."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._host, int(self._port))
        self._writers += [writer, far_writer]
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                if not self.is_shut:
                    writer.write(data)
        except OSError:
            pass  # an end that was reset is an end
        if not self.is_shut:
            writer.close()


class Servicer(prefill_service_pb2_grpc.PrefillServiceServicer):
    """Admits, and never comes to a token."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()

    async def Prefill(
        self, request: pb.PrefillRequest, context: Context
    ) -> AsyncIterator[pb.PrefillResponse]:
        try:
            yield pb.PrefillResponse(admitted=pb.PrefillAdmitted())
            await asyncio.Event().wait()
        finally:
            self.let_go.set()


async def test_both_ends_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """By pings, within the patience for their answers, whoever sent them and why."""
    monkeypatch.setattr(serve, "_PING_AFTER_MS", 300)
    monkeypatch.setattr(serve, "_PATIENCE_MS", 300)
    servicer, endpoint = Servicer(), Endpoint(max_message_bytes=1 << 20)
    prefill_service_pb2_grpc.add_PrefillServiceServicer_to_server(servicer, endpoint.server)
    await endpoint.start("127.0.0.1", 0, [])
    valve = Valve(endpoint.address)
    address = await valve.open()
    async with grpc.aio.insecure_channel(address, options=channel_options(1 << 20)) as channel:
        stub = prefill_service_pb2_grpc.PrefillServiceStub(channel)
        responses = aiter(stub.Prefill(pb.PrefillRequest()))
        assert (await anext(responses)).HasField("admitted")
        valve.is_shut = True
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with asyncio.timeout(LIMIT_S):
                await anext(responses)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await asyncio.wait_for(servicer.let_go.wait(), LIMIT_S)
    await valve.close()
    await endpoint.stop(0)
