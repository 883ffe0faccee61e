"""Streams in processes of their own, so that no client is the bottleneck: when each token came."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Any

from baton.loadtest.drivers import request_of
from baton.shared.rpc.serve import internal_channel
from baton.v1 import inference_service_pb2_grpc as pb_grpc

_STREAMS_PER_CLIENT = 64
_PAUSE_S = 0.2

Prompts = Sequence[Sequence[int]]
Arrivals = list[list[float]]
"""By stream, when each token came: seconds of the clock that processes share."""


class StreamClients:
    """As many processes as `num_streams` streams at once need; there at once."""

    def __init__(self, num_streams: int) -> None:
        self._num = -(-num_streams // _STREAMS_PER_CLIENT)
        self._processes = ProcessPoolExecutor(
            self._num, mp_context=multiprocessing.get_context("spawn")
        )
        # Else the first ones would do the work of those that are still starting.
        present: set[int] = set()
        while len(present) < self._num:
            present |= set(self._processes.map(_own_pid, [_PAUSE_S] * self._num))

    def __enter__(self) -> StreamClients:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._processes.shutdown(cancel_futures=True)

    async def ask(self, address: str, prompts: Prompts, num_tokens: int) -> Arrivals:
        """All prompts at once, greedy, `num_tokens` tokens each. Raises grpc.RpcError."""
        loop = asyncio.get_running_loop()
        num = min(self._num, -(-len(prompts) // _STREAMS_PER_CLIENT))
        parts = await asyncio.gather(
            *(
                loop.run_in_executor(self._processes, _ask, address, prompts[i::num], num_tokens)
                for i in range(num)
            )
        )
        return [stream for part in parts for stream in part]


def _own_pid(pause_s: float) -> int:
    time.sleep(pause_s)
    return os.getpid()


def _ask(address: str, prompts: Prompts, num_tokens: int) -> Arrivals:
    async def ask_all() -> Arrivals:
        async with internal_channel(address) as channel:
            stub = pb_grpc.InferenceServiceStub(channel)
            asking = (token_times(stub, prompt, num_tokens) for prompt in prompts)
            return list(await asyncio.gather(*asking))

    return asyncio.run(ask_all())


async def token_times(stub: Any, prompt: Sequence[int], num_tokens: int) -> list[float]:
    """When each token of an answer came, in seconds of the monotonic clock; greedy."""
    came: list[float] = []
    async for response in stub.Generate(request_of(prompt, num_tokens)):
        if response.HasField("chunk"):
            came += [time.monotonic()] * len(response.chunk.token_ids)
    return came
