"""The path of a request.

    generate      admit ─► attempts ─► text and stop strings ─► answer
    attempts      one attempt after the other, until the answer is complete
    run_attempt   locate ─► choose ─► start on P and D ─► tokens

There is one recovery path: whatever goes wrong, the attempt is cancelled wherever it runs, and
the next one starts with the prompt and all tokens emitted so far, as if it were a new prompt.
Only the current attempt's tokens are taken, and of them only the next index.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from baton.services.gateway.admission import AdmittedRequest, admit
from baton.services.gateway.cluster import Cluster
from baton.services.gateway.identity import Identity
from baton.services.gateway.links import (
    Event,
    Events,
    Failed,
    Joined,
    PromptAdmitted,
    Token,
    follow_prefill,
)
from baton.services.gateway.metrics import GatewayMetrics
from baton.services.gateway.report import RequestReport, cause
from baton.services.gateway.router import Route
from baton.services.gateway.tokenizer import StreamDecoder, TextCodec
from baton.shared.kv.sequence import AttemptKey, FinishReason
from baton.shared.rpc.convert import FINISH_REASON_TO_PB, duration_to_pb, key_to_pb, sampling_to_pb
from baton.shared.rpc.errors import (
    AttemptFailed,
    CapabilityMismatch,
    DigestMismatch,
    Draining,
    EngineFailure,
    SourceLost,
    TooManyAttempts,
)
from baton.shared.telemetry import Counters, log_event
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import prefill_service_pb2, types_pb2

logger = logging.getLogger(__name__)

_MAX_ENGINE_FAILURES = 3
_MAX_FRUITLESS = 16
"""After so many attempts in a row without a token the fault is one that stays. Waiting for a worker
is no attempt."""
_MAX_PATIENCE_DOUBLINGS = 5
_PAUSE_S = 0.02
"""Before another attempt, so that a fault that repeats at once does not keep the gateway busy."""


@dataclass(slots=True)
class Generation:
    """One request on its way."""

    request_id: str
    admitted: AdmittedRequest
    deadline: float | None
    """Seconds on the monotonic clock."""
    arrived_at: float
    token_ids: list[int] = field(default_factory=list)
    """Generated so far, those that the client brought included."""
    finish_reason: FinishReason | None = None
    num_attempts: int = 0
    num_fruitless: int = 0
    """Attempts in a row that brought no token."""
    distrust: bool = False
    capability_hash: str | None = None
    num_cached_tokens: int = 0
    transfer_s: float | None = None
    prefill_worker_id: str = ""
    decode_worker_id: str = ""
    prefill_admitted_at: float = 0.0
    """By the first attempt's prefill worker."""
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    @property
    def num_new(self) -> int:
        """Tokens beyond those that the client brought."""
        return len(self.token_ids) - len(self.admitted.received)


async def generate(
    request: pb.GenerateRequest,
    *,
    identity: Identity,
    request_id: str,
    deadline: float | None,
    cluster: Cluster,
    codec: TextCodec | None,
    eos_token_ids: frozenset[int],
    counters: Counters,
    metrics: GatewayMetrics,
) -> AsyncGenerator[pb.GenerateResponse, None]:
    """Everything that happens to a request, in order.

    Raises a BatonError; nothing has been allocated anywhere when it is an InvalidField.
    """
    arrived_at = time.monotonic()
    with RequestReport(request_id, arrived_at, deadline, metrics) as report:
        encode = codec.encode_async if codec else None
        admitted = await admit(
            request,
            cluster.limits(),
            encode=encode,
            eos_token_ids=eos_token_ids,
            identity=identity,
        )
        counters["requests"] += 1
        generation = Generation(request_id, admitted, deadline, arrived_at, list(admitted.received))
        report.admitted(generation)
        started = pb.GenerateStarted(
            request_id=request_id,
            seed=admitted.params.seed,
            num_prompt_tokens=len(admitted.prompt_token_ids),
        )
        yield pb.GenerateResponse(started=started)

        decoder = _new_decoder(codec, request, admitted) if codec else None
        generation.finish_reason = _finished_before(admitted, decoder)
        async with aclosing(attempts(generation, cluster, counters, metrics)) as runs:
            async for run in runs:
                report.tokens_came(generation.last_token_at)
                yield pb.GenerateResponse(chunk=_chunk(generation, decoder, run))
                if decoder is not None and decoder.stopped:
                    break
        text = None
        if decoder is not None:
            text = decoder.finish()
            if decoder.stopped:
                generation.finish_reason = FinishReason.STOP
        assert generation.finish_reason is not None
        report.finished(generation.finish_reason)
        yield pb.GenerateResponse(finished=_finished(generation, text))


def _new_decoder(
    codec: TextCodec, request: pb.GenerateRequest, admitted: AdmittedRequest
) -> StreamDecoder:
    return StreamDecoder(
        codec,
        admitted.params.stops,
        prompt=() if request.standalone_text else admitted.prompt_token_ids,
        end_token_ids=admitted.params.stop_token_ids,
    )


def _finished_before(
    admitted: AdmittedRequest, decoder: StreamDecoder | None
) -> FinishReason | None:
    """Whether the tokens that a resuming client has are the whole answer already."""
    if not admitted.received:
        return None
    if decoder is not None:
        decoder.push(admitted.received)
        if decoder.stopped:
            return FinishReason.STOP
    if admitted.received[-1] in admitted.params.stop_token_ids:
        return FinishReason.STOP
    is_full = len(admitted.received) >= admitted.params.max_tokens
    return FinishReason.LENGTH if is_full else None


def _chunk(
    generation: Generation, decoder: StreamDecoder | None, run: list[int]
) -> pb.GenerateChunk:
    """New tokens and the text that they make certain; what follows a stop string is cut off."""
    chunk = pb.GenerateChunk(first_index=len(generation.token_ids) - len(run))
    if decoder is not None:
        delta = decoder.push(run)
        chunk.text = delta.text
        if delta.stopped:
            del generation.token_ids[chunk.first_index + delta.num_tokens_used :]
            run = run[: delta.num_tokens_used]
    chunk.token_ids.extend(run)
    return chunk


def _finished(generation: Generation, text: str | None) -> pb.GenerateFinished:
    admitted, num_new = generation.admitted, generation.num_new
    finished = pb.GenerateFinished(
        finish_reason=FINISH_REASON_TO_PB[generation.finish_reason],
        usage=pb.Usage(
            num_prompt_tokens=len(admitted.prompt_token_ids),
            num_completion_tokens=len(generation.token_ids),
            num_cached_tokens=generation.num_cached_tokens,
        ),
        prefill_worker_id=generation.prefill_worker_id,
        decode_worker_id=generation.decode_worker_id,
        num_attempts=generation.num_attempts,
    )
    if text is not None:
        finished.text = text
    timing = finished.timing
    e2e_s = (generation.last_token_at or time.monotonic()) - generation.arrived_at
    timing.e2e_time.CopyFrom(duration_to_pb(e2e_s))
    if num_new:
        ttft_s = generation.first_token_at - generation.arrived_at
        timing.ttft_time.CopyFrom(duration_to_pb(ttft_s))
        if num_new > 1:
            timing.tpot_time.CopyFrom(duration_to_pb((e2e_s - ttft_s) / (num_new - 1)))
    if generation.transfer_s is not None:
        timing.transfer_time.CopyFrom(duration_to_pb(generation.transfer_s))
    return finished


async def attempts(
    generation: Generation, cluster: Cluster, counters: Counters, metrics: GatewayMetrics
) -> AsyncGenerator[list[int], None]:
    """Runs of new tokens, until the last one. Raises what no other attempt would mend."""
    num_engine_failures = 0
    while generation.finish_reason is None:
        generation.num_attempts += 1
        generation.num_fruitless += 1
        counters["attempts"] += 1
        try:
            async with aclosing(run_attempt(generation, cluster)) as runs:
                async for run in runs:
                    generation.num_fruitless = 0
                    yield run
        except (AttemptFailed, Draining, CapabilityMismatch) as error:
            log_event(
                logger,
                logging.WARNING,
                "attempt failed",
                request_id=generation.request_id,
                attempt=generation.num_attempts,
                cause=cause(error),
                num_tokens=generation.num_new,
                prefill=generation.prefill_worker_id or None,
                decode=generation.decode_worker_id or None,
                message=error.message,
            )
            num_engine_failures += isinstance(error, EngineFailure)
            if num_engine_failures >= _MAX_ENGINE_FAILURES:
                raise
            if generation.num_fruitless >= _MAX_FRUITLESS:
                raise TooManyAttempts(
                    f"{_MAX_FRUITLESS} attempts in a row brought no token; the last: "
                    f"{error.message}"
                ) from error
            generation.distrust |= isinstance(error, DigestMismatch)
            counters["extra_attempts"] += 1
            metrics.extra_attempts.labels(cause(error)).inc()
            await asyncio.sleep(_PAUSE_S)


async def run_attempt(generation: Generation, cluster: Cluster) -> AsyncGenerator[list[int], None]:
    """One try on one route. Raises what ended it; cancels it on P and D however it ends."""
    token_ids = [*generation.admitted.prompt_token_ids, *generation.token_ids]
    num_left = generation.admitted.params.max_tokens - len(generation.token_ids)
    route = await cluster.route(
        token_ids,
        num_left,
        generation.capability_hash,
        salt=generation.admitted.identity.cache_salt,
        has_begun=bool(generation.token_ids),
    )
    # The one token that is left comes from P: nobody has to take its blocks over.
    wants_decode = route.prefill is None or num_left > 1
    key = AttemptKey(generation.request_id, 0, generation.num_attempts)
    generation.prefill_worker_id = route.prefill.worker_id if route.prefill else ""
    generation.decode_worker_id = route.decode.worker_id if wants_decode else ""

    events: Events = asyncio.Queue()
    patience = 2.0 ** min(generation.num_fruitless - 1, _MAX_PATIENCE_DOUBLINGS)
    prefill = link = None
    number = 0
    is_prompt_open = True
    try:
        spec = _sequence_spec(generation, key, token_ids, route.decode.capability_hash)
        if route.prefill is not None:
            request = prefill_service_pb2.PrefillRequest(sequence=spec, unclaimed=not wants_decode)
            call = follow_prefill(
                cluster.channel(route.prefill), route.prefill.incarnation, request, events, patience
            )
            prefill = asyncio.create_task(call)
        if wants_decode:
            link = cluster.link(route.decode)
            number = link.start(spec, _source(route), events, patience)
        while generation.finish_reason is None:
            run: list[int] = []
            failure: Failed | None = None
            for event in await _take_all(events):
                match event:
                    case Token(index, token_id, finish_reason):
                        # P and D both bring the first token; what came before is not the next.
                        is_next = index == len(generation.token_ids)
                        if is_next and generation.finish_reason is None:
                            generation.token_ids.append(token_id)
                            generation.finish_reason = finish_reason
                            run.append(token_id)
                    case PromptAdmitted(num_cached_tokens):
                        _note_cached(generation, num_cached_tokens)
                        if generation.num_attempts == 1:
                            generation.prefill_admitted_at = time.monotonic()
                    case Joined(num_cached_tokens, transfer_s):
                        generation.transfer_s = transfer_s
                        if route.prefill is None:
                            _note_cached(generation, num_cached_tokens)
                    case Failed():
                        failure = failure or event
            if run and is_prompt_open:
                is_prompt_open = False
                cluster.prompt_ended(route)
            if run:
                generation.capability_hash = route.decode.capability_hash
                now = time.monotonic()
                generation.first_token_at = generation.first_token_at or now
                generation.last_token_at = now
                yield run
            if failure is not None and generation.finish_reason is None:
                if failure.worker_incarnation is not None:
                    cluster.doubt(failure.worker_incarnation)
                elif isinstance(failure.error, SourceLost) and route.prefill is not None:
                    cluster.doubt(route.prefill.incarnation)
                raise failure.error
    finally:
        if is_prompt_open:
            cluster.prompt_ended(route)
        if prefill is not None:
            prefill.cancel()
        if link is not None:
            link.end(number, key)


async def _take_all(events: Events) -> list[Event]:
    """At least one; tokens that piled up go out as one message."""
    taken = [await events.get()]
    while not events.empty():
        taken.append(events.get_nowait())
    return taken


def _sequence_spec(
    generation: Generation, key: AttemptKey, token_ids: list[int], capability_hash: str
) -> types_pb2.SequenceSpec:
    spec = types_pb2.SequenceSpec(
        key=key_to_pb(key),
        token_ids=token_ids,
        first_index=len(generation.token_ids),
        sampling=sampling_to_pb(generation.admitted.params),
        distrust=generation.distrust,
        cache_salt=generation.admitted.identity.cache_salt,
        capability_hash=capability_hash,
    )
    if generation.deadline is not None:
        time_left_s = max(0.0, generation.deadline - time.monotonic())
        spec.time_left.CopyFrom(duration_to_pb(time_left_s))
    return spec


def _source(route: Route) -> types_pb2.WorkerAddress | None:
    if route.prefill is None:
        return None
    return types_pb2.WorkerAddress(
        worker_id=route.prefill.worker_id,
        incarnation=route.prefill.incarnation,
        address=route.prefill.address,
    )


def _note_cached(generation: Generation, num_cached_tokens: int) -> None:
    """Later attempts find what earlier ones computed; that is not the client's prefix."""
    if generation.num_attempts == 1:
        generation.num_cached_tokens = num_cached_tokens
