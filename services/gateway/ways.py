"""The ways to workers: a stream to each decode worker, calls to each prefill worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

import grpc

from baton.services.gateway.links import DecodeLink
from baton.services.gateway.prefill_calls import PrefillCalls
from baton.services.gateway.router import WorkerSnapshot
from baton.shared.directory.workers import WorkerRecord
from baton.shared.rpc.serve import internal_channel
from baton.v1 import decode_service_pb2

_CHANNEL_GRACE_S = 600.0


class Ways:
    def __init__(self, gateway_incarnation: str, on_broken: Callable[[str], None]) -> None:
        """`on_broken` is told the incarnation of a worker whose stream broke."""
        self._gateway_incarnation = gateway_incarnation
        self._on_broken = on_broken
        self._links: dict[str, DecodeLink] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        """By address."""
        self._calls: dict[str, PrefillCalls] = {}
        """By incarnation, as links."""
        self._closing: set[asyncio.Task[None]] = set()

    def link(self, worker: WorkerSnapshot) -> DecodeLink:
        link = self._links.get(worker.incarnation)
        if link is None:
            hello = decode_service_pb2.DecodeHello(gateway_incarnation=self._gateway_incarnation)
            link = DecodeLink(worker.incarnation, worker.address, hello, self._link_broken)
            self._links[worker.incarnation] = link
        return link

    def prefill_calls(self, worker: WorkerSnapshot | WorkerRecord) -> PrefillCalls:
        calls = self._calls.get(worker.incarnation)
        if calls is None:
            channel = self._channels.get(worker.address)
            if channel is None:
                channel = self._channels[worker.address] = internal_channel(worker.address)
            calls = self._calls[worker.incarnation] = PrefillCalls(channel)
        return calls

    async def follow(self, workers: Collection[WorkerRecord]) -> None:
        """Has calls ready for those of `workers` that compute prompts for others; closes what leads
        to none of them, and serves no sequence any more."""
        for worker in workers:
            if worker.role == "prefill":
                self.prefill_calls(worker).fill()
        incarnations = {worker.incarnation for worker in workers}
        addresses = {worker.address for worker in workers}
        for incarnation, link in list(self._links.items()):
            if incarnation not in incarnations and not link.num_sequences:
                del self._links[incarnation]
                await link.close()
        for incarnation, calls in list(self._calls.items()):
            if incarnation not in incarnations:
                del self._calls[incarnation]
                calls.close()
        for address, channel in list(self._channels.items()):
            if address not in addresses:
                del self._channels[address]
                # Calls that still run on it end by themselves.
                closing = asyncio.create_task(channel.close(grace=_CHANNEL_GRACE_S))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        for link in list(self._links.values()):
            await link.close()
        for calls in self._calls.values():
            calls.close()
        for channel in self._channels.values():
            await channel.close()

    def _link_broken(self, incarnation: str) -> None:
        self._links.pop(incarnation, None)
        self._on_broken(incarnation)
