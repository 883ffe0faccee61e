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

from collections.abc import Callable
from dataclasses import dataclass, field

from baton.services.worker import messages as msg
from baton.services.worker.sequence_table import Recipient
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.sequence import AttemptKey, FinishReason, Sequence
from baton.shared.rpc.convert import FINISH_REASON_FROM_PB
from baton.shared.rpc.errors import (
    AttemptFailed,
    BatonError,
    Cancelled,
    ClaimBroken,
    DigestMismatch,
    WorkerLost,
    from_failure,
)
from baton.shared.sampling import SamplingParams
from baton.v1 import decode_service_pb2, types_pb2
from baton.v1.prefill_service_pb2 import PrefillResponse
from tests.unit.worker.network import Channel, Clock, Network
from tests.unit.worker.sim_worker import SimWorker

_MAX_ROUNDS = 2000


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
    prediction: tuple[int, ...] = ()
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
    hearsay: BatonError | None = None
    """What one worker was told by the other, which has not said it itself yet."""


class Cluster:
    """A gateway and its network; starts are sent to the workers `prefill` and `decode`."""

    def __init__(self, runners: dict[str, ModelRunner], clock: Clock) -> None:
        self.clock = clock
        self.network = Network(runners, clock, self)
        self.requests: list[Request] = []
        self._attempts: dict[AttemptKey, Attempt] = {}
        self._recipients: dict[Recipient, AttemptKey] = {}

    def submit(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        expected: list[int],
        *,
        time_left_s: float | None = None,
        is_local: bool = False,
        prediction: tuple[int, ...] = (),
    ) -> Request:
        deadline = None if time_left_s is None else self.clock.now + time_left_s
        name = f"r{next(self.network.numbers)}"
        request = Request(name, prompt, params, expected, deadline, is_local, prediction)
        self.requests.append(request)
        self._start(request)
        return request

    def cancel(self, request: Request) -> None:
        if request.outcome is None:
            request.outcome = "cancelled by the client"
            self._end(self._current(request))

    def settle(self, *, until: Callable[[], bool] = lambda: False) -> None:
        """No more faults: everything is delivered, until nothing is left to do, or `until`."""
        network = self.network
        for _ in range(_MAX_ROUNDS):
            if until():
                return
            for channel in network.busy_channels:
                while network.channels[channel]:
                    network.deliver(channel)
            for name, worker in network.workers.items():
                network.finish_pull(name)
                network.step(name)
                worker.check()
            self.clock.now += 0.05
            is_over = all(request.outcome is not None for request in self.requests)
            left = {name: worker.leftovers for name, worker in network.workers.items()}
            if is_over and not network.busy_channels and not any(left.values()):
                return
        outcomes = [(request.request_id, request.outcome) for request in self.requests]
        raise AssertionError(f"does not come to rest: {left}, {outcomes}")

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
            None if request.is_local else self.network.workers["prefill"],
            self.network.workers["decode"] if wants_decode else None,
        )
        self._attempts[key] = attempt
        if attempt.prefill is not None:
            self._command(
                ("call", key, attempt.prefill.incarnation),
                attempt.prefill,
                msg.StartPrefill(self._sequence(attempt), not wants_decode),
            )
        if attempt.decode is not None:
            recipient = Recipient(attempt.decode.gateway_stream, next(self.network.numbers))
            self._recipients[recipient] = key
            source = attempt.prefill.peer if attempt.prefill is not None else None
            self._to_decode(
                attempt.decode, msg.StartDecode(self._sequence(attempt), recipient, source)
            )

    def _sequence(self, attempt: Attempt) -> Sequence:
        request = attempt.request
        return Sequence(
            attempt.key,
            request.prompt + tuple(request.token_ids),
            request.params,
            first_index=attempt.first_index,
            prediction_token_ids=request.prediction,
            distrust=request.distrust,
            deadline=request.deadline,
        )

    def _command(self, channel: Channel, worker: SimWorker, command: msg.Command) -> None:
        if self.network.is_alive(worker.incarnation):
            self.network.send(channel, lambda: worker.inbox.put(command))

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

    # What the network tells

    def on_worker_lost(self, worker: SimWorker) -> None:
        for attempt in list(self._attempts.values()):
            if worker in (attempt.prefill, attempt.decode):
                attempt.prefill = None if attempt.prefill is worker else attempt.prefill
                attempt.decode = None if attempt.decode is worker else attempt.decode
                self._failed_soon(attempt)

    def on_stream_lost(self, stream: str) -> None:
        for recipient, key in list(self._recipients.items()):
            attempt = self._attempts[key]
            if recipient.gateway == stream and attempt.decode is not None:
                attempt.decode = None
                self._failed_soon(attempt)

    def _failed_soon(self, attempt: Attempt) -> None:
        lost = WorkerLost("it fell silent")
        self.network.send(("silence", attempt.key), lambda: self._on_failed(attempt, lost))

    def on_prefill_event(self, key: AttemptKey, event: PrefillResponse | BatonError) -> None:
        attempt = self._attempts[key]
        if attempt.prefill is None:
            return
        if isinstance(event, BatonError):
            attempt.prefill = None
            is_hearsay = isinstance(event, Cancelled) and attempt.decode is not None
            self._on_failed(attempt, event, is_hearsay=is_hearsay)
        elif event.HasField("first_token"):
            attempt.prefill = None
            first = event.first_token
            self._on_token(attempt, attempt.first_index, first.token_id, first.finish_reason)
            if attempt.hearsay is not None:
                self._on_failed(attempt, attempt.hearsay)

    def on_decode_event(self, stream: str, response: decode_service_pb2.DecodeResponse) -> None:
        if response.HasField("failed"):
            attempt = self._attempts[self._recipients[Recipient(stream, response.failed.slot)]]
            if attempt.decode is not None:
                attempt.decode = None
                error = from_failure(response.failed.failure)
                is_hearsay = isinstance(error, ClaimBroken) and attempt.prefill is not None
                self._on_failed(attempt, error, is_hearsay=is_hearsay)
        step = response.step
        for number, index, token_id, reason in zip(
            step.slots, step.indices, step.token_ids, step.finish_reasons, strict=True
        ):
            attempt = self._attempts[self._recipients[Recipient(stream, number)]]
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

    def _on_failed(self, attempt: Attempt, error: BatonError, *, is_hearsay: bool = False) -> None:
        request = attempt.request
        if is_hearsay:
            attempt.hearsay = error
            return
        if request.outcome is not None or attempt.key.attempt != request.num_attempts:
            return
        self._end(attempt)
        if isinstance(error, AttemptFailed):
            request.distrust |= isinstance(error, DigestMismatch)
            self._start(request)
        else:
            request.outcome = error
