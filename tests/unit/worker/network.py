"""The wires between simulated workers: nothing arrives, and nothing breaks, but when told to.

Every message waits in a channel until it is delivered. Channels are those of the real system:
order is kept within one, and nowhere else. What mailroom.py and hold.py do with asyncio is done
here by plain calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Protocol

import torch

from baton.services.worker import messages as msg
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.digest import block_sums, digests, seeds
from baton.shared.kv.sequence import AttemptKey
from baton.shared.rpc.convert import key_from_pb
from baton.shared.rpc.errors import BatonError, SourceLost
from baton.shared.transfer.puller import PullJob, PullResult
from baton.v1 import decode_service_pb2, kv_service_pb2
from baton.v1.prefill_service_pb2 import PrefillResponse
from tests.unit.worker.sim_worker import SimWorker

Channel = tuple[object, ...]


class Clock:
    """Stands in for the module `time` in what is simulated."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class GatewayEnd(Protocol):
    """What the network tells the gateway."""

    def on_prefill_event(self, key: AttemptKey, event: PrefillResponse | BatonError) -> None: ...

    def on_decode_event(self, stream: str, response: decode_service_pb2.DecodeResponse) -> None: ...

    def on_worker_lost(self, worker: SimWorker) -> None: ...

    def on_stream_lost(self, stream: str) -> None: ...


@dataclass
class HoldStream:
    reader: SimWorker
    owner: SimWorker
    name: str
    is_broken: bool = False


class Network:
    """`runners`: by worker name. All workers are started."""

    def __init__(self, runners: dict[str, ModelRunner], clock: Clock, gateway: GatewayEnd) -> None:
        self.clock = clock
        self.gateway = gateway
        self.numbers = count(1)
        self._runners = runners
        self.workers: dict[str, SimWorker] = {}
        self.channels: dict[Channel, deque[Callable[[], None]]] = {}
        self.holds: dict[tuple[str, str], HoldStream] = {}
        """(reader's incarnation, owner's incarnation) → stream, as the reader sees it."""
        self.corrupted: set[tuple[str, int, int]] = set()
        """(incarnation, pool, block id) of every block that was ever changed by other than its
        owner."""
        for name in runners:
            self._boot(name)

    def _boot(self, name: str) -> None:
        incarnation = f"{next(self.numbers):032x}"
        self.workers[name] = SimWorker(name, incarnation, self._runners[name], self._post)

    @property
    def busy_channels(self) -> list[Channel]:
        return [channel for channel, mail in self.channels.items() if mail]

    def deliver(self, channel: Channel) -> None:
        self.channels[channel].popleft()()

    def step(self, name: str) -> None:
        self.workers[name].engine.run_once(may_wait=False)

    def go_round(self) -> None:
        """Each worker takes a step, with all that has been sent before it."""
        for name in self.workers:
            for channel in self.busy_channels:
                while self.channels[channel]:
                    self.deliver(channel)
            self.finish_pull(name)
            self.step(name)

    def finish_pull(self, name: str, *, corrupt: bool = False) -> None:
        """Reads the blocks as they are now, which may be long after they were announced."""
        worker = self.workers[name]
        if worker.jobs:
            worker.inbox.put(msg.Pulled(self._pull(worker, worker.jobs.popleft(), corrupt)))

    def corrupt_sealed(self, name: str, index: int) -> None:
        """Writes over one block that is sealed, of any group, and held or to be found."""
        worker = self.workers[name]
        sealed = [
            (number, block_id)
            for number, pool in enumerate(worker.pools.by_number)
            for block_id, block in enumerate(map(pool.block, range(pool.num_blocks)))
            if block.digest is not None and (block.ref_count or block.block_hash is not None)
        ]
        if sealed:
            number, block_id = sealed[index % len(sealed)]
            # Of the groups that share the pool, all see the whole of a block.
            group = worker.runner.arrangement.pools.index(number)
            _scramble(worker, group, block_id)
            self.corrupted.add((worker.incarnation, number, block_id))

    def kill(self, name: str) -> None:
        """The worker is gone with all that was under way to and from it, and starts anew."""
        dead = self.workers[name]
        for channel in list(self.channels):
            if dead.incarnation in channel:
                del self.channels[channel]
        for stream in list(self.holds.values()):
            if dead in (stream.reader, stream.owner):
                self.break_hold(stream)
        self.gateway.on_worker_lost(dead)
        self._boot(name)

    def break_hold(self, stream: HoldStream) -> None:
        """Both ends will notice, each in its time; what was on its way is lost."""
        if stream.is_broken:
            return
        stream.is_broken = True
        self.channels.pop(("hold", stream.name, stream.reader.incarnation), None)
        self.channels.pop(("hold", stream.name, stream.owner.incarnation), None)
        reader, owner = stream.reader, stream.owner
        self.send(
            ("lost", stream.name, owner.incarnation),
            lambda: owner.inbox.put(msg.ReaderLost(stream.name)),
        )
        self.send(("lost", stream.name, reader.incarnation), lambda: self._lost_source(stream))

    def break_gateway_stream(self, name: str) -> None:
        worker = self.workers[name]
        stream = worker.gateway_stream
        for kind in ("tokens", "starts"):
            self.channels.pop((kind, stream, worker.incarnation), None)
        worker.gateway_stream = f"{name}-{worker.incarnation}-gateway-{next(self.numbers)}"
        self.send(
            ("lost", stream, worker.incarnation),
            lambda: worker.inbox.put(msg.GatewayLost(stream)),
        )
        self.gateway.on_stream_lost(stream)

    def check(self) -> None:
        for worker in self.workers.values():
            worker.check()

    def send(self, channel: Channel, deliver: Callable[[], None]) -> None:
        self.channels.setdefault(channel, deque()).append(deliver)

    def is_alive(self, incarnation: str) -> bool:
        return any(worker.incarnation == incarnation for worker in self.workers.values())

    def _post(self, worker: SimWorker, mail: list[msg.Outgoing]) -> None:
        """What an engine delivers at the end of an iteration."""
        for message in mail:
            match message:
                case msg.ToPrefillStream(key, event):
                    self.send(
                        ("first", key, worker.incarnation),
                        partial(self.gateway.on_prefill_event, key, event),
                    )
                case msg.ToGateway(stream, response):
                    if stream == worker.gateway_stream:
                        self.send(
                            ("tokens", stream, worker.incarnation),
                            partial(self.gateway.on_decode_event, stream, response),
                        )
                case msg.ToSource(source, request):
                    self._to_source(worker, source, request)
                case msg.ToReader(reader, response):
                    self._to_reader(worker, reader, response)
                case msg.LedgerWrite(entry):
                    worker.ledger.add(AttemptKey(entry.request_id, entry.sample, entry.attempt))
                case msg.LedgerEnd(key) | msg.LedgerHandedOver(key):
                    worker.ledger.discard(key)

    def _to_source(
        self, reader: SimWorker, source: msg.Peer, message: kv_service_pb2.HoldRequest
    ) -> None:
        stream = self.holds.get((reader.incarnation, source.incarnation))
        if stream is None:
            if message.HasField("claim"):
                stream = self._open_hold(reader, source)
        if stream is not None and not stream.is_broken:
            command = msg.FromReader(stream.name, message)
            owner, hold = stream.owner, stream

            def hear() -> None:
                # As the mailroom does: a release is answered without waiting for the engine.
                if message.HasField("release"):
                    key = key_from_pb(message.release.key)
                    answer = owner.engine.answer_release(key, hold.name)
                    self._tell(hold, msg.FromSource(owner.peer, answer))
                owner.inbox.put(command)

            self.send(("hold", stream.name, owner.incarnation), hear)

    def _open_hold(self, reader: SimWorker, source: msg.Peer) -> HoldStream | None:
        if not self.is_alive(source.incarnation):
            gone = msg.SourceGone(source, SourceLost("cannot be reached"))
            self.send(("refused", reader.incarnation), lambda: reader.inbox.put(gone))
            return None
        owner = self.workers[source.worker_id]
        stream = HoldStream(reader, owner, f"{reader.peer.worker_id}-{next(self.numbers)}")
        self.holds[reader.incarnation, source.incarnation] = stream
        hello = kv_service_pb2.HoldResponse(
            hello=kv_service_pb2.HoldHelloReply(
                worker_id=source.worker_id,
                incarnation=source.incarnation,
                pool=owner.description(),
            )
        )
        self._to_reader(owner, stream.name, hello)
        return stream

    def _to_reader(self, owner: SimWorker, name: str, message: kv_service_pb2.HoldResponse) -> None:
        for stream in self.holds.values():
            if stream.name == name and not stream.is_broken:
                self._tell(stream, msg.FromSource(owner.peer, message))

    def _tell(self, stream: HoldStream, command: msg.FromSource) -> None:
        reader = stream.reader
        self.send(("hold", stream.name, reader.incarnation), lambda: reader.inbox.put(command))

    def _lost_source(self, stream: HoldStream) -> None:
        del self.holds[stream.reader.incarnation, stream.owner.incarnation]
        error = SourceLost("the source fell silent")
        stream.reader.inbox.put(msg.SourceGone(stream.owner.peer, error))

    def _pull(self, worker: SimWorker, job: PullJob, corrupt: bool) -> PullResult:
        now, group = self.clock.now, job.group
        number = worker.runner.arrangement.pools[group]
        num_heads = worker.runner.groups[group].num_pieces
        if not self.is_alive(job.peer.incarnation):
            sums = block_sums(torch.empty(0, num_heads, 1, dtype=torch.int32))
            return PullResult(job.job_id, (), sums, "the pool is gone", now, now)
        [source] = [w for w in self.workers.values() if w.incarnation == job.peer.incarnation]
        local = [copy.local_block_id for copy in job.copies]
        remote = [copy.remote_block_id for copy in job.copies]
        blocks = worker.runner.kv_cache.tensors[group]
        blocks[local] = source.runner.kv_cache.tensors[group][remote]
        if corrupt:
            self.corrupted.add((source.incarnation, number, remote[-1]))
            _scramble(worker, group, local[-1])
        sums = block_sums(worker.runner.kv_cache.block_words(local, group))
        generations = [block.generation for block in job.expected]
        landed = digests(sums, seeds(source.incarnation, remote, generations, num_heads)).tolist()
        mismatched = tuple(
            i
            for i, (row, block) in enumerate(zip(landed, job.expected, strict=True))
            if tuple(row) != block.digests
        )
        honest = [
            i for i in mismatched if (source.incarnation, number, remote[i]) not in self.corrupted
        ]
        if honest:
            key = worker.engine._pulls._jobs[job.job_id].key
            assert key not in source.engine._claims, "claimed blocks were written"
        return PullResult(job.job_id, mismatched, sums, None, now, now)


def _scramble(worker: SimWorker, group: int, block_id: int) -> None:
    for tensor in worker.runner.kv_cache.typed(group):
        tensor[block_id].neg_().sub_(1)
