"""The gateway's streams to workers.

To a decode worker there is one DecodeLink, for all sequences; a worker that was started anew gets a
new one. To a prefill worker there is one call for each prompt. Both put what they hear into the
attempt's queue of events.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import grpc

from baton.services.gateway.prefill_calls import PrefillCall, PrefillCalls, ask
from baton.shared.kv.sequence import AttemptKey, FinishReason
from baton.shared.rpc.convert import (
    FINISH_REASON_FROM_PB,
    add_sequence,
    duration_from_pb,
    key_from_pb,
    key_to_pb,
)
from baton.shared.rpc.errors import (
    BatonError,
    Cancelled,
    ClaimBroken,
    Draining,
    WorkerLost,
    from_failure,
    from_rpc_error,
)
from baton.shared.rpc.serve import internal_channel
from baton.shared.rpc.streams import SILENCE_S, TICK_S, only_own_cancels, until_silence, with_ticks
from baton.shared.telemetry import log_event
from baton.v1 import (
    decode_service_pb2,
    decode_service_pb2_grpc,
    prefill_service_pb2,
    types_pb2,
)

logger = logging.getLogger(__name__)

_STUCK_S = 5.0
_STUCK_STEPS = 10
"""An engine is stuck when a step takes that many times its longest one, and at least `_STUCK_S`."""


@dataclass(frozen=True, slots=True)
class Token:
    """`index` is among the request's generated tokens."""

    index: int
    token_id: int
    finish_reason: FinishReason | None
    logprobs: types_pb2.TokenLogprobs | None = None
    """If they are wanted."""


@dataclass(frozen=True, slots=True)
class PromptTold:
    """Logprobs of a run of the prompt's tokens; all come before who computed it brings a token."""

    logprobs: types_pb2.PromptLogprobs


@dataclass(frozen=True, slots=True)
class PromptAdmitted:
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Joined:
    num_cached_tokens: int
    transfer_s: float | None
    """None: there was no hand-off."""


@dataclass(frozen=True, slots=True)
class PredictionChecked:
    """What came of guesses by the client's prediction; comes before the tokens of the step."""

    num_accepted: int
    num_rejected: int


@dataclass(frozen=True, slots=True)
class Failed:
    """`worker_incarnation`: the worker that the failure casts doubt on; None: no worker.

    `is_hearsay`: who says it was told so by the other of P and D, which ended the sequence, or the
    hand-off, and tells the gateway itself why.
    """

    error: BatonError
    worker_incarnation: str | None
    is_hearsay: bool = False


Event = Token | PromptTold | PromptAdmitted | Joined | PredictionChecked | Failed
Events = asyncio.Queue[Event]


class StallWatch:
    """Notices an engine that stands still with something to compute, while its streams tick."""

    def __init__(self) -> None:
        self._step = 0
        self._since_s = time.monotonic()
        self._longest_s = 0.0

    def heard(self, step: int, *, busy: bool = True) -> None:
        now = time.monotonic()
        if step != self._step and busy:
            self._longest_s = max(self._longest_s, now - self._since_s)
        if step != self._step or not busy:
            self._step, self._since_s = step, now

    def is_stuck(self, patience: float) -> bool:
        limit_s = patience * max(_STUCK_S, _STUCK_STEPS * self._longest_s)
        return time.monotonic() - self._since_s > limit_s


@dataclass(slots=True)
class _Attempt:
    events: Events
    patience: float
    """By what the usual limits are multiplied: more after fruitless attempts, as the cluster may
    just be slow."""


class DecodeLink:
    """The stream to one incarnation of a decode worker. When it breaks, another takes its place."""

    def __init__(
        self,
        incarnation: str,
        address: str,
        hello: decode_service_pb2.DecodeHello,
        on_broken: Callable[[str], None],
    ) -> None:
        self.incarnation = incarnation
        self._address = address
        self._attempts: dict[int, _Attempt] = {}
        self._numbers = count(1)
        self._requests: asyncio.Queue[decode_service_pb2.DecodeRequest] = asyncio.Queue()
        self._requests.put_nowait(decode_service_pb2.DecodeRequest(hello=hello))
        self._on_broken = on_broken
        self._last_heard_s = time.monotonic()
        self._steps = StallWatch()
        self._task = asyncio.create_task(self._run())
        self._watchdog = asyncio.create_task(self._watch())

    @property
    def num_sequences(self) -> int:
        return len(self._attempts)

    def start(
        self,
        spec: types_pb2.SequenceSpec,
        source: types_pb2.WorkerAddress | None,
        events: Events,
        patience: float,
    ) -> int:
        """Begins an attempt; returns its number on this stream."""
        number = next(self._numbers)
        if not self._attempts:
            self._last_heard_s = time.monotonic()
        self._attempts[number] = _Attempt(events, patience)
        request = decode_service_pb2.DecodeRequest()
        request.start.slot = number
        add_sequence(request.start.sequence, spec)
        if source is not None:
            request.start.source.CopyFrom(source)
        self._requests.put_nowait(request)
        return number

    def end(self, number: int, key: AttemptKey) -> None:
        """Nothing more is wanted of the attempt. The worker is told, even if it has ended it
        already."""
        self._attempts.pop(number, None)
        message = decode_service_pb2.CancelSequence(key=key_to_pb(key))
        self._requests.put_nowait(decode_service_pb2.DecodeRequest(cancel=message))

    async def close(self) -> None:
        self._task.cancel()
        self._watchdog.cancel()
        await asyncio.gather(self._task, self._watchdog, return_exceptions=True)

    async def _run(self) -> None:
        error = WorkerLost("the decode worker closed its stream")
        try:
            async with internal_channel(self._address) as channel:
                stub = decode_service_pb2_grpc.DecodeServiceStub(channel)
                with only_own_cancels():
                    async for message in stub.Decode(with_ticks(self._requests, _tick_request)):
                        self._last_heard_s = time.monotonic()
                        self._take(message)
        except grpc.aio.AioRpcError as rpc_error:
            error = WorkerLost(f"decode worker: {from_rpc_error(rpc_error).message}")
        except Exception:
            log_event(
                logger, logging.ERROR, "decode link failed", address=self._address, exc_info=True
            )
            error = WorkerLost("the decode worker's stream could not be read")
        self._watchdog.cancel()
        for attempt in self._attempts.values():
            attempt.events.put_nowait(Failed(error, self.incarnation))
        self._attempts.clear()
        self._on_broken(self.incarnation)

    async def _watch(self) -> None:
        """Fails attempts when the worker is silent, or its engine stuck, for longer than they
        allow."""
        while True:
            await asyncio.sleep(TICK_S / 2)
            silent_s = time.monotonic() - self._last_heard_s
            for number, attempt in list(self._attempts.items()):
                if silent_s > attempt.patience * SILENCE_S:
                    error = WorkerLost(f"the decode worker was silent for {silent_s:.1f} s")
                elif self._steps.is_stuck(attempt.patience):
                    error = WorkerLost("the decode worker's engine stands still")
                else:
                    continue
                attempt.events.put_nowait(Failed(error, self.incarnation))
                del self._attempts[number]

    def _take(self, message: decode_service_pb2.DecodeResponse) -> None:
        match message.WhichOneof("message"):
            case "tick":
                self._steps.heard(message.tick.step, busy=message.tick.busy)
            case "step":
                step = message.step
                self._steps.heard(step.step)
                for joined in step.joined:
                    self._take_joined(joined)
                for checked in step.predictions:
                    attempt = self._attempts.get(checked.slot)
                    if attempt is not None:
                        attempt.events.put_nowait(
                            PredictionChecked(checked.num_accepted, checked.num_rejected)
                        )
                told = {each.column: each.logprobs for each in step.logprobs}
                columns = zip(
                    step.slots, step.indices, step.token_ids, step.finish_reasons, strict=True
                )
                for column, (number, index, token_id, finish_reason) in enumerate(columns):
                    attempt = self._attempts.get(number)
                    if attempt is not None:
                        reason = FINISH_REASON_FROM_PB[finish_reason]
                        token = Token(index, token_id, reason, told.get(column))
                        attempt.events.put_nowait(token)
            case "prompt_logprobs":
                attempt = self._attempts.get(message.prompt_logprobs.slot)
                if attempt is not None:
                    attempt.events.put_nowait(PromptTold(message.prompt_logprobs.logprobs))
            case "joined":
                self._take_joined(message.joined)
            case "failed":
                attempt = self._attempts.pop(message.failed.slot, None)
                if attempt is not None:
                    error = from_failure(message.failed.failure)
                    # What breaks a claim is known to the source.
                    is_hearsay = isinstance(error, ClaimBroken)
                    attempt.events.put_nowait(Failed(error, self._doubted(error), is_hearsay))

    def _take_joined(self, joined: decode_service_pb2.SequenceJoined) -> None:
        attempt = self._attempts.get(joined.slot)
        if attempt is not None:
            transfer_s = None
            if joined.HasField("transfer_time"):
                transfer_s = duration_from_pb(joined.transfer_time)
            attempt.events.put_nowait(Joined(joined.num_cached_tokens, transfer_s))

    def _doubted(self, error: BatonError) -> str | None:
        return self.incarnation if isinstance(error, Draining) else None


def _tick_request() -> decode_service_pb2.DecodeRequest:
    return decode_service_pb2.DecodeRequest(tick=types_pb2.Tick())


async def follow_prefill(
    calls: PrefillCalls,
    incarnation: str,
    request: prefill_service_pb2.PrefillRequest,
    events: Events,
    patience: float,
) -> None:
    """Runs one Prefill call until its first token or its failure. Cancelling the task cancels the
    call."""
    call: PrefillCall | None = None
    first_index, steps = request.sequence.first_index, StallWatch()
    error: BatonError = WorkerLost("the prefill worker ended without a token")
    is_doubtful = True
    try:
        call = calls.take()
        with only_own_cancels():
            async for event in until_silence(ask(call, request), patience * SILENCE_S):
                if event.HasField("tick"):
                    steps.heard(event.tick.step, busy=event.tick.busy)
                    if steps.is_stuck(patience):
                        error = WorkerLost("the prefill worker's engine stands still")
                        break
                elif event.HasField("admitted"):
                    events.put_nowait(PromptAdmitted(event.admitted.num_cached_tokens))
                elif event.HasField("prompt_logprobs"):
                    events.put_nowait(PromptTold(event.prompt_logprobs))
                elif event.HasField("first_token"):
                    first = event.first_token
                    reason = FINISH_REASON_FROM_PB[first.finish_reason]
                    told = first.logprobs if first.HasField("logprobs") else None
                    events.put_nowait(Token(first_index, first.token_id, reason, told))
                    return
    except TimeoutError:
        error = WorkerLost(f"the prefill worker was silent for {patience * SILENCE_S:.1f} s")
    except grpc.aio.AioRpcError as rpc_error:
        error = from_rpc_error(rpc_error)
        is_doubtful = isinstance(error, WorkerLost | Draining)
    except Exception:
        key = key_from_pb(request.sequence.key)
        log_event(logger, logging.ERROR, "prefill call failed", key=key, exc_info=True)
    finally:
        if call is not None:
            call.cancel()
    # Only its reader gives a claim up while the call runs; that one knows why.
    is_hearsay = isinstance(error, Cancelled)
    events.put_nowait(Failed(error, incarnation if is_doubtful else None, is_hearsay))
