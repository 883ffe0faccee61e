"""One generator's process: it is given its load and its share, says when it is prepared, and is
told to begin. run.py starts it, nobody else.

Standard input: the load and the share, a line; then a line to go. Standard output: a line when
prepared, then a line for each sample, then one with what it cost.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import uvloop

from baton.loadtest.conversations import Conversation, Workload, workload_of
from baton.loadtest.drivers import Driver, driver_for
from baton.loadtest.samples import Sample, Watch
from baton.loadtest.spec import Load
from baton.loadtest.target import Target

_PREPARED_BYTES = 64 << 20
"""So many bytes of requests are made before the first one is sent; the others on the way."""
_BEAT_S = 0.02


@dataclass(frozen=True)
class Share:
    """Which of `num_shards`: it takes the conversations index, index + num_shards, ..."""

    index: int
    num_shards: int

    def of(self, number: int) -> int:
        """This share's number of `number` equal things."""
        return number // self.num_shards + (self.index < number % self.num_shards)


@dataclass
class Prepared:
    """A conversation with its first request ready to be sent."""

    conversation: Conversation
    prompt: list[int]
    request: bytes
    at_s: float = 0.0


class Queue:
    """The share's conversations in order, some of them prepared ahead."""

    def __init__(self, load: Load, share: Share, driver: Driver) -> None:
        self._load, self._driver = load, driver
        self._workload = workload_of(load)
        self._numbers = _numbers(load, self._workload, share)
        self._ready: deque[Prepared] = deque()
        self._num_bytes = 0
        self._is_exhausted = False
        while not self._is_exhausted and self._num_bytes < _PREPARED_BYTES:
            # A closed loop without an end is prepared for its first rounds.
            if (
                self._workload.num_conversations is None
                and len(self._ready) >= 64 + 4 * load.num_streams
            ):
                break
            self._prepare()

    def pop(self) -> Prepared | None:
        """None when there are no more."""
        if not self._ready:
            self._prepare()
        if not self._ready:
            return None
        prepared = self._ready.popleft()
        self._num_bytes -= len(prepared.request)
        return prepared

    def refill(self) -> None:
        """Prepares one more, in place of the one that was taken."""
        if self._num_bytes < _PREPARED_BYTES:
            self._prepare()

    def _prepare(self) -> None:
        number = next(self._numbers, None)
        if number is None:
            self._is_exhausted = True
            return
        conversation = self._workload.conversation(number)
        first = conversation[0]
        prompt = first.token_ids(self._load)
        request = self._driver.encode(prompt, first.output_tokens)
        prepared = Prepared(conversation, prompt if len(conversation) > 1 else [], request)
        if self._workload.arrivals is not None:
            prepared.at_s = self._workload.arrivals[number]
        self._ready.append(prepared)
        self._num_bytes += len(request)


def _numbers(load: Load, workload: Workload, share: Share) -> Iterator[int]:
    end = workload.num_conversations
    if end is None and load.num_requests is not None:
        end = -(-load.num_requests // load.num_turns)
    number = share.index
    while end is None or number < end:
        yield number
        number += share.num_shards


class Generator:
    def __init__(self, load: Load, share: Share, driver: Driver) -> None:
        self.samples: list[Sample] = []
        self.lag_s: list[float] = []
        self._load, self._share, self._driver = load, share, driver
        self._queue = Queue(load, share, driver)
        self._started_s = 0.0

    async def run(self) -> None:
        self._started_s = time.monotonic()
        beat = asyncio.create_task(self._beat())
        try:
            await (self._closed_loop() if self._load.is_closed else self._open_loop())
        finally:
            beat.cancel()

    async def _open_loop(self) -> None:
        tasks = []
        while (prepared := self._queue.pop()) is not None:
            await asyncio.sleep(max(0.0, prepared.at_s - self._now()))
            tasks.append(asyncio.create_task(self._converse(prepared, prepared.at_s)))
            self._queue.refill()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self._load.drain_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
            for task in tasks:
                if not task.cancelled():
                    task.result()

    async def _closed_loop(self) -> None:
        end_s = self._load.duration_s

        async def client() -> None:
            while end_s is None or self._now() < end_s:
                prepared = self._queue.pop()
                if prepared is None:
                    return
                await self._converse(prepared, self._now())

        num_clients = self._share.of(self._load.num_streams)
        clients = [asyncio.create_task(client()) for _ in range(num_clients)]
        limit_s = None if end_s is None else end_s + self._load.drain_s
        if clients:
            done, late = await asyncio.wait(clients, timeout=limit_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
            for task in done:
                task.result()

    async def _converse(self, prepared: Prepared, at_s: float) -> None:
        """Turn after turn; one that fails ends it."""
        request, said = prepared.request, prepared.prompt
        for index, turn in enumerate(prepared.conversation):
            if index:
                said += turn.token_ids(self._load)
                request = self._driver.encode(said, turn.output_tokens)
                at_s = self._now() + self._load.think_s
                await asyncio.sleep(self._load.think_s)
            is_last = index == len(prepared.conversation) - 1
            answer: list[int] | None = None if is_last else []
            sample = Sample(at_s)
            self.samples.append(sample)
            await self._ask(request, sample, answer)
            if sample.status != "OK":
                return
            said += answer or ()

    async def _ask(self, request: bytes, sample: Sample, answer: list[int] | None) -> None:
        watch = Watch(sample, self._started_s)
        try:
            async with asyncio.timeout(self._load.timeout_s):
                await self._driver.ask(request, watch, answer)
        except asyncio.CancelledError:
            sample.detail = f"no end {self._load.drain_s:g} s after the load (--drain)"
            raise
        except TimeoutError:
            sample.status = "TIMEOUT"
            sample.detail = f"no end within {self._load.timeout_s:g} s"

    async def _beat(self) -> None:
        """How late this loop wakes is how late it reads answers."""
        while True:
            asked_s = time.monotonic() + _BEAT_S
            await asyncio.sleep(_BEAT_S)
            self.lag_s.append(max(0.0, time.monotonic() - asked_s))

    def _now(self) -> float:
        return time.monotonic() - self._started_s


async def _offer(load: Load, share: Share) -> None:
    driver = driver_for(Target.parse(load.target), load.model)
    try:
        generator = Generator(load, share, driver)
        print(json.dumps("ready"), flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        _end_with_parent()
        cpu_before_s, before_s = time.process_time(), time.monotonic()
        await generator.run()
        cpu_s, elapsed_s = time.process_time() - cpu_before_s, time.monotonic() - before_s
    finally:
        await driver.close()
    for sample in generator.samples:
        print(json.dumps(asdict(sample), separators=(",", ":")))
    cost = {"cpu_s": cpu_s, "elapsed_s": elapsed_s, "lag_s": generator.lag_s}
    print(json.dumps(cost), flush=True)


def _end_with_parent() -> None:
    """Nothing more comes on standard input. When it ends, nobody wants this load any more."""
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), os._exit, 1)


def main() -> None:
    # Ctrl-C in a terminal reaches every process; the parent ends its shards.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked = json.loads(sys.stdin.readline())
    window = asked["load"].pop("window_s")
    load = Load(**asked["load"], window_s=tuple(window) if window else None)
    uvloop.run(_offer(load, Share(**asked["share"])))


if __name__ == "__main__":
    main()
