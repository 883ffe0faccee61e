"""A cluster in one thread: real engine loops, and a network that a test drives message by message.

    gateway ──start, cancel──► prefill worker  ◄──claim, release── decode worker ◄── start, cancel
       ▲                            │    └────announce, released─────────►│                 │
       └────────first token─────────┘                  pull ◄─────────────┘─────tokens──────┘

Nothing happens by itself: every message waits in a channel until the test delivers it, every pull
until the test lets it finish, every engine until the test runs an iteration, and the clock stands
still until it is moved. Channels are those of the real system: order is kept within one, and
nowhere else. The gateway is a small model of services/gateway/generate.py: one recovery path.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import torch
from baton.v1 import decode_service_pb2, kv_service_pb2, types_pb2, worker_service_pb2
from baton.v1.prefill_service_pb2 import PrefillResponse

from services.worker import messages as msg
from services.worker.engine_loop import EngineLoop
from services.worker.failpoints import Failpoints
from services.worker.sealing import Sealer
from services.worker.sequence_table import Slot
from services.worker.stepper import StepLimits
from shared.engine.model_runner import ModelRunner
from shared.kv.block_pool import BlockPool
from shared.kv.digest import block_sums, digests, seeds
from shared.kv.sequence import AttemptKey, FinishReason, SamplingParams, Sequence
from shared.rpc.convert import FINISH_REASON_FROM_PB, key_from_pb
from shared.rpc.errors import (
    AttemptFailed,
    BatonError,
    DigestMismatch,
    SourceLost,
    WorkerLost,
    from_failure,
)
from shared.telemetry import Counters, Trace
from shared.transfer.puller import PullJob, PullResult

Channel = tuple[object, ...]
CAPABILITY = "c" * 64
_MAX_ROUNDS = 2000


class Clock:
    """Stands in for the module `time` in what is simulated."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class SimWorker:
    """One start of one worker."""

    def __init__(self, name: str, incarnation: str, runner: ModelRunner, network: Cluster) -> None:
        self.peer = msg.Peer(name, incarnation, f"{name}.test")
        self.runner = runner
        self.pool = BlockPool(runner.num_blocks, runner.kv_cache.block_size)
        self.inbox: queue.SimpleQueue[msg.Command] = queue.SimpleQueue()
        self.jobs: deque[PullJob] = deque()
        self.counters = Counters()
        self.gateway_stream = f"{name}-{incarnation}-gateway-1"
        self.ledger: set[AttemptKey] = set()
        """Attempts of which this worker would refresh the entry."""
        failpoints = Failpoints(set())
        self.engine = EngineLoop(
            runner,
            self.pool,
            Sealer(self.pool, runner.kv_cache, incarnation, CAPABILITY, failpoints),
            identity=self.peer,
            limits=StepLimits(token_budget=8, max_num_seqs=4),
            inbox=self.inbox,
            submit_pull=self.jobs.append,
            deliver=lambda mail: network.post(self, mail),
            failpoints=failpoints,
            counters=self.counters,
            trace=Trace(None, name),
        )

    @property
    def incarnation(self) -> str:
        return self.peer.incarnation

    def description(self) -> kv_service_pb2.PoolDescription:
        cache = self.runner.kv_cache
        return kv_service_pb2.PoolDescription(
            incarnation=self.incarnation,
            num_blocks=cache.num_blocks,
            block_bytes=cache.block_bytes,
            num_heads=cache.groups[0].spec.num_kv_heads,
        )

    def check(self) -> None:
        states: list[worker_service_pb2.GetWorkerStateResponse] = []
        self.engine._handle(msg.Inspect(True, states.append))
        assert [state.integrity_error for state in states] == [""]

    @property
    def leftovers(self) -> dict[str, object]:
        """All that must be nothing when every request is over; {} when it is."""
        engine = self.engine
        found = {
            "blocks": self.pool.num_blocks - self.pool.num_free,
            "quarantined": self.pool.num_quarantined,
            "sequences": engine._table.all(),
            "claims": engine._claims._claims,
            "pulls": engine._pulls._pulls,
            "jobs": engine._pulls._jobs,
            "slots": engine._table._slots,
            "coming": engine._admitter._coming,
            "unclaimed": engine._unclaimed,
            "computed_at": engine._computed_at,
            "ledger": self.ledger,
        }
        return {name: left for name, left in found.items() if left}


@dataclass
class HoldStream:
    reader: SimWorker
    owner: SimWorker
    name: str
    is_broken: bool = False


@dataclass
class Request:
    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    expected: list[int]
    """What an undisturbed run answers."""
    deadline: float | None
    is_local: bool
    """The decode worker computes the prompt itself."""
    token_ids: list[int] = field(default_factory=list)
    num_attempts: int = 0
    distrust: bool = False
    outcome: FinishReason | BatonError | str | None = None


@dataclass
class Attempt:
    key: AttemptKey
    request: Request
    first_index: int
    prefill: SimWorker | None
    decode: SimWorker | None
    """None where nothing is open any more."""


class Cluster:
    """`runners`: by worker name; starts are sent to `prefill` and `decode`."""

    def __init__(self, runners: dict[str, ModelRunner], clock: Clock) -> None:
        self.clock = clock
        self._runners = runners
        self._numbers = count(1)
        self.workers: dict[str, SimWorker] = {}
        self.channels: dict[Channel, deque[Callable[[], None]]] = {}
        self.holds: dict[tuple[str, str], HoldStream] = {}
        """(reader's incarnation, owner's incarnation) → stream, as the reader sees it."""
        self.requests: list[Request] = []
        self._attempts: dict[AttemptKey, Attempt] = {}
        self._slots: dict[Slot, AttemptKey] = {}
        self.corrupted: set[tuple[str, int]] = set()
        """(incarnation, block id) of every block that was ever changed by other than its owner."""
        for name in runners:
            self._boot(name)

    def _boot(self, name: str) -> None:
        incarnation = f"{next(self._numbers):032x}"
        self.workers[name] = SimWorker(name, incarnation, self._runners[name], self)

    # What the test drives

    @property
    def busy_channels(self) -> list[Channel]:
        return [channel for channel, mail in self.channels.items() if mail]

    def deliver(self, channel: Channel) -> None:
        self.channels[channel].popleft()()

    def step(self, name: str) -> None:
        self.workers[name].engine.run_once(may_wait=False)

    def finish_pull(self, name: str, *, corrupt: bool = False) -> None:
        """Reads the blocks as they are now, which may be long after they were announced."""
        worker = self.workers[name]
        if worker.jobs:
            worker.inbox.put(msg.Pulled(self._pull(worker, worker.jobs.popleft(), corrupt)))

    def corrupt_sealed(self, name: str, index: int) -> None:
        """Writes over one block that is sealed, and held or to be found."""
        worker = self.workers[name]
        blocks = [worker.pool.block(block_id) for block_id in range(worker.pool.num_blocks)]
        sealed = [
            block_id
            for block_id, block in enumerate(blocks)
            if block.digest is not None and (block.ref_count or block.block_hash is not None)
        ]
        if sealed:
            block_id = sealed[index % len(sealed)]
            worker.runner.kv_cache.tensors[0][block_id].neg_().sub_(1)
            self.corrupted.add((worker.incarnation, block_id))

    def submit(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        expected: list[int],
        *,
        time_left_s: float | None = None,
        is_local: bool = False,
    ) -> Request:
        deadline = None if time_left_s is None else self.clock.now + time_left_s
        name = f"r{next(self._numbers)}"
        request = Request(name, prompt, params, expected, deadline, is_local)
        self.requests.append(request)
        self._start(request)
        return request

    def cancel(self, request: Request) -> None:
        if request.outcome is None:
            request.outcome = "cancelled by the client"
            self._end(self._current(request))

    def kill(self, name: str) -> None:
        """The worker is gone with all that was under way to and from it, and starts anew."""
        dead = self.workers[name]
        for channel in list(self.channels):
            if dead.incarnation in channel:
                del self.channels[channel]
        for stream in list(self.holds.values()):
            if dead in (stream.reader, stream.owner):
                self.break_hold(stream)
        for attempt in list(self._attempts.values()):
            self._lose(attempt, dead)
        self._boot(name)

    def break_hold(self, stream: HoldStream) -> None:
        """Both ends will notice, each in its time; what was on its way is lost."""
        if stream.is_broken:
            return
        stream.is_broken = True
        self.channels.pop(("hold", stream.name, stream.reader.incarnation), None)
        self.channels.pop(("hold", stream.name, stream.owner.incarnation), None)
        reader, owner = stream.reader, stream.owner
        self._send(
            ("lost", stream.name, owner.incarnation),
            lambda: owner.inbox.put(msg.ReaderLost(stream.name)),
        )
        self._send(("lost", stream.name, reader.incarnation), lambda: self._lost_source(stream))

    def break_gateway_stream(self, name: str) -> None:
        worker = self.workers[name]
        stream = worker.gateway_stream
        for channel in [("tokens", stream), ("starts", stream, worker.incarnation)]:
            self.channels.pop(channel, None)
        worker.gateway_stream = f"{name}-{worker.incarnation}-gateway-{next(self._numbers)}"
        self._send(
            ("lost", stream, worker.incarnation),
            lambda: worker.inbox.put(msg.GatewayLost(stream)),
        )
        for slot, key in list(self._slots.items()):
            attempt = self._attempts.get(key)
            if slot.gateway == stream and attempt is not None and attempt.decode is worker:
                attempt.decode = None
                self._failed_soon(attempt)

    def settle(self) -> None:
        """No more faults: everything is delivered, until nothing is left to do."""
        for _ in range(_MAX_ROUNDS):
            for channel in self.busy_channels:
                while self.channels[channel]:
                    self.deliver(channel)
            for name in self.workers:
                self.finish_pull(name)
                self.step(name)
                self.workers[name].check()
            self.clock.now += 0.05
            if all(request.outcome is not None for request in self.requests) and not any(
                worker.leftovers or self.busy_channels for worker in self.workers.values()
            ):
                return
        left = {name: worker.leftovers for name, worker in self.workers.items()}
        outcomes = [(request.request_id, request.outcome) for request in self.requests]
        raise AssertionError(f"does not come to rest: {left}, {outcomes}")

    def check(self) -> None:
        for worker in self.workers.values():
            worker.check()

    # The network

    def _send(self, channel: Channel, deliver: Callable[[], None]) -> None:
        self.channels.setdefault(channel, deque()).append(deliver)

    def _is_alive(self, incarnation: str) -> bool:
        return any(worker.incarnation == incarnation for worker in self.workers.values())

    def post(self, worker: SimWorker, mail: list[msg.Outgoing]) -> None:
        """What an engine delivers at the end of an iteration."""
        for message in mail:
            match message:
                case msg.ToPrefillStream(key, event):
                    self._send(
                        ("first", key, worker.incarnation),
                        partial(self._on_prefill_event, key, event),
                    )
                case msg.ToGateway(stream, response):
                    if stream == worker.gateway_stream:
                        self._send(
                            ("tokens", stream, worker.incarnation),
                            partial(self._on_decode_event, stream, response),
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

            self._send(("hold", stream.name, owner.incarnation), hear)

    def _open_hold(self, reader: SimWorker, source: msg.Peer) -> HoldStream | None:
        if not self._is_alive(source.incarnation):
            gone = msg.SourceGone(source, SourceLost("cannot be reached"))
            self._send(("refused", reader.incarnation), lambda: reader.inbox.put(gone))
            return None
        owner = self.workers[source.worker_id]
        stream = HoldStream(reader, owner, f"{reader.peer.worker_id}-{next(self._numbers)}")
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
        self._send(("hold", stream.name, reader.incarnation), lambda: reader.inbox.put(command))

    def _lost_source(self, stream: HoldStream) -> None:
        del self.holds[stream.reader.incarnation, stream.owner.incarnation]
        error = SourceLost("the source fell silent")
        stream.reader.inbox.put(msg.SourceGone(stream.owner.peer, error))

    def _pull(self, worker: SimWorker, job: PullJob, corrupt: bool) -> PullResult:
        now = self.clock.now
        num_heads = worker.runner.groups[0].spec.num_kv_heads
        if not self._is_alive(job.peer.incarnation):
            sums = block_sums(torch.empty(0, num_heads, 1, dtype=torch.int32))
            return PullResult(job.job_id, (), sums, "the pool is gone", now, now)
        [source] = [w for w in self.workers.values() if w.incarnation == job.peer.incarnation]
        local = [copy.local_block_id for copy in job.copies]
        remote = [copy.remote_block_id for copy in job.copies]
        blocks = worker.runner.kv_cache.tensors[0]
        blocks[local] = source.runner.kv_cache.tensors[0][remote]
        if corrupt:
            self.corrupted.add((source.incarnation, remote[-1]))
            blocks[local[-1]].neg_().sub_(1)
        sums = block_sums(worker.runner.kv_cache.block_words(local))
        generations = [block.generation for block in job.expected]
        landed = digests(sums, seeds(source.incarnation, remote, generations, num_heads)).tolist()
        mismatched = tuple(
            i
            for i, (row, block) in enumerate(zip(landed, job.expected, strict=True))
            if tuple(row) != block.digests
        )
        honest = [i for i in mismatched if (source.incarnation, remote[i]) not in self.corrupted]
        if honest:
            key = worker.engine._pulls._jobs[job.job_id].key
            assert key not in source.engine._claims, "claimed blocks were written"
        return PullResult(job.job_id, mismatched, sums, None, now, now)

    # The gateway

    def _current(self, request: Request) -> Attempt:
        return self._attempts[AttemptKey(request.request_id, 0, request.num_attempts)]

    def _start(self, request: Request) -> None:
        request.num_attempts += 1
        key = AttemptKey(request.request_id, 0, request.num_attempts)
        wants_decode = request.is_local or request.params.max_tokens - len(request.token_ids) > 1
        attempt = Attempt(
            key,
            request,
            len(request.token_ids),
            None if request.is_local else self.workers["prefill"],
            self.workers["decode"] if wants_decode else None,
        )
        self._attempts[key] = attempt
        if attempt.prefill is not None:
            self._command(
                ("call", key, attempt.prefill.incarnation),
                attempt.prefill,
                msg.StartPrefill(self._sequence(attempt), not wants_decode),
            )
        if attempt.decode is not None:
            slot = Slot(attempt.decode.gateway_stream, next(self._numbers))
            self._slots[slot] = key
            source = attempt.prefill.peer if attempt.prefill is not None else None
            self._to_decode(attempt.decode, msg.StartDecode(self._sequence(attempt), slot, source))

    def _sequence(self, attempt: Attempt) -> Sequence:
        request = attempt.request
        return Sequence(
            attempt.key,
            request.prompt + tuple(request.token_ids),
            request.params,
            first_index=attempt.first_index,
            distrust=request.distrust,
            deadline=request.deadline,
        )

    def _command(self, channel: Channel, worker: SimWorker, command: msg.Command) -> None:
        if self._is_alive(worker.incarnation):
            self._send(channel, lambda: worker.inbox.put(command))

    def _to_decode(self, worker: SimWorker, command: msg.Command) -> None:
        self._command(("starts", worker.gateway_stream, worker.incarnation), worker, command)

    def _end(self, attempt: Attempt) -> None:
        cancel = msg.CancelAttempts(attempt.key)
        if attempt.prefill is not None:
            channel = ("call", attempt.key, attempt.prefill.incarnation)
            self._command(channel, attempt.prefill, cancel)
        if attempt.decode is not None:
            self._to_decode(attempt.decode, cancel)
        attempt.prefill = attempt.decode = None

    def _lose(self, attempt: Attempt, dead: SimWorker) -> None:
        if dead in (attempt.prefill, attempt.decode):
            attempt.prefill = None if attempt.prefill is dead else attempt.prefill
            attempt.decode = None if attempt.decode is dead else attempt.decode
            self._failed_soon(attempt)

    def _failed_soon(self, attempt: Attempt) -> None:
        lost = WorkerLost("it fell silent")
        self._send(("silence", attempt.key), lambda: self._on_failed(attempt, lost))

    def _on_prefill_event(self, key: AttemptKey, event: PrefillResponse | BatonError) -> None:
        attempt = self._attempts[key]
        if attempt.prefill is None:
            return
        if isinstance(event, BatonError):
            attempt.prefill = None
            self._on_failed(attempt, event)
        elif event.HasField("first_token"):
            attempt.prefill = None
            first = event.first_token
            self._on_token(attempt, attempt.first_index, first.token_id, first.finish_reason)

    def _on_decode_event(self, stream: str, response: decode_service_pb2.DecodeResponse) -> None:
        if response.HasField("failed"):
            attempt = self._attempts[self._slots[Slot(stream, response.failed.slot)]]
            if attempt.decode is not None:
                attempt.decode = None
                self._on_failed(attempt, from_failure(response.failed.failure))
        step = response.step
        for slot, index, token_id, reason in zip(
            step.slots, step.indices, step.token_ids, step.finish_reasons, strict=True
        ):
            attempt = self._attempts[self._slots[Slot(stream, slot)]]
            if attempt.decode is not None:
                if FINISH_REASON_FROM_PB[reason] is not None:
                    attempt.decode = None
                self._on_token(attempt, index, token_id, reason)

    def _on_token(
        self, attempt: Attempt, index: int, token_id: int, reason_pb: types_pb2.FinishReason
    ) -> None:
        """Every token that any attempt says is the right one, also where it isn't taken."""
        request = attempt.request
        reason = FINISH_REASON_FROM_PB[reason_pb]
        assert request.expected[index] == token_id, (attempt.key, index)
        assert (reason is not None) == (index == len(request.expected) - 1)
        is_current = attempt.key.attempt == request.num_attempts and request.outcome is None
        if is_current and index == len(request.token_ids):
            request.token_ids.append(token_id)
            if reason is not None:
                request.outcome = reason
                self._end(attempt)

    def _on_failed(self, attempt: Attempt, error: BatonError) -> None:
        request = attempt.request
        if request.outcome is not None or attempt.key.attempt != request.num_attempts:
            return
        self._end(attempt)
        if isinstance(error, AttemptFailed):
            request.distrust |= isinstance(error, DigestMismatch)
            self._start(request)
        else:
            request.outcome = error
