"""The path of a request.

    generate      admit ─► one sample, or several side by side ─► answer
    _sample       attempts ─► text and stop strings
    attempts      one attempt after the other, until the sample is complete
    run_attempt   locate ─► choose ─► start on P and D ─► tokens              (attempt.py)

There is one recovery path: whatever goes wrong, the attempt is cancelled wherever it runs, and
the next one starts with the prompt and all tokens emitted so far, as if it were a new prompt.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from functools import cache, partial

from baton.services.gateway.admission import (
    AdmittedRequest,
    CheckConstraint,
    ModelDefaults,
    admit,
    chat_token_ids,
)
from baton.services.gateway.attempt import run_attempt
from baton.services.gateway.cluster import Cluster
from baton.services.gateway.generation import Generation
from baton.services.gateway.identity import Identity
from baton.services.gateway.merged import begun, merged
from baton.services.gateway.metrics import GatewayMetrics
from baton.services.gateway.report import RequestReport, cause
from baton.services.gateway.shared_prompt import SharedPrompt
from baton.services.gateway.tokenizer import StreamDecoder, TextCodec
from baton.shared.kv.sequence import FinishReason
from baton.shared.rpc.convert import FINISH_REASON_TO_PB, duration_to_pb
from baton.shared.rpc.errors import (
    AttemptFailed,
    BatonError,
    CapabilityMismatch,
    DigestMismatch,
    Draining,
    EngineFailure,
    TooManyAttempts,
)
from baton.shared.telemetry import NO_TRACE, Counters, Trace, log_event
from baton.v1 import inference_service_pb2 as pb

logger = logging.getLogger(__name__)

Decoder = Callable[[], StreamDecoder | None]
"""Gives one and the same of a sample; None when the model has no tokenizer."""

_MAX_ENGINE_FAILURES = 3
_MAX_FRUITLESS = 16
"""After so many attempts in a row without a token the fault is one that stays. Waiting for a worker
is no attempt."""
_PAUSE_S = 0.02
"""Before another attempt, so that a fault that repeats at once does not keep the gateway busy."""


async def generate(
    request: pb.GenerateRequest,
    *,
    identity: Identity,
    request_id: str,
    deadline: float | None,
    cluster: Cluster,
    codec: TextCodec | None,
    defaults: ModelDefaults,
    counters: Counters,
    metrics: GatewayMetrics,
    shown_token_ids: Collection[int] = (),
    check_constraint: CheckConstraint | None = None,
    is_cut_off: Callable[[], bool] = lambda: False,
    trace: Trace = NO_TRACE,
) -> AsyncGenerator[pb.GenerateResponse, None]:
    """Everything that happens to a request, in order. `shown_token_ids`: see StreamDecoder,
    `is_cut_off`: RequestReport.

    Raises a BatonError. When it is an InvalidField before the first message, nothing is allocated
    anywhere.
    """
    arrived_at = time.monotonic()
    with RequestReport(
        request_id, arrived_at, deadline, metrics, is_cut_off=is_cut_off, trace=trace
    ) as report:
        limits = cluster.limits()
        admitted = await admit(
            request,
            limits,
            encode=codec.encode_async if codec else None,
            encode_chat=partial(chat_token_ids, limits=limits, codec=codec) if codec else None,
            encode_answer=partial(codec.encode_async, add_special_tokens=False) if codec else None,
            check_constraint=check_constraint,
            defaults=defaults,
            identity=identity,
        )
        counters["requests"] += 1
        samples = _samples(request_id, admitted, deadline, arrived_at)
        report.admitted(samples)
        new_decoder = partial(_new_decoder, codec, request, admitted, shown_token_ids)
        decoders = _decoders(new_decoder, len(samples))
        _share_prompt(samples, decoders)
        answers = [
            _sample(generation, decoder, cluster, counters, metrics, report)
            for generation, decoder in zip(samples, decoders, strict=True)
        ]
        async with begun(merged(answers)) as responses:
            # Workers have the prompt while this is made, and on its way.
            decoders[0]()
            yield pb.GenerateResponse(started=_started(samples[0], cluster))
            async for _, response in responses:
                yield response


def _samples(
    request_id: str, admitted: AdmittedRequest, deadline: float | None, arrived_at: float
) -> list[Generation]:
    return [
        Generation(request_id, admitted, deadline, arrived_at, sample)
        for sample in range(admitted.num_samples)
    ]


def _decoders(new_decoder: Decoder, num_samples: int) -> list[Decoder]:
    """By sample; made when they are asked for the first time, which no prompt waits for."""
    first = cache(new_decoder)

    def another() -> StreamDecoder | None:
        decoder = first()
        return decoder and decoder.another()

    return [first, *(cache(another) for _ in range(1, num_samples))]


def _share_prompt(samples: Sequence[Generation], decoders: Sequence[Decoder]) -> None:
    """Ends those of which the client has all tokens; of the others the first computes the prompt
    of all."""
    for generation, decoder in zip(samples, decoders, strict=True):
        generation.finish_reason = _finished_before(generation, decoder)
    unfinished = [each for each in samples if each.finish_reason is None]
    if len(unfinished) > 1:
        prompt = SharedPrompt(len(unfinished[0].admitted.prompt_token_ids))
        for generation in unfinished:
            generation.prompt = prompt
            generation.computes_prompt = generation is unfinished[0]


async def _sample(
    generation: Generation,
    decoder_of: Decoder,
    cluster: Cluster,
    counters: Counters,
    metrics: GatewayMetrics,
    report: RequestReport,
) -> AsyncGenerator[pb.GenerateResponse, None]:
    """One of a request's answers: chunks, and its end."""
    await generation.wait_for_prompt()
    if generation.admitted.wants_no_token and not generation.computes_prompt:
        generation.drop_tokens()
    async with aclosing(attempts(generation, cluster, counters, metrics)) as runs:
        async for run in runs:
            report.tokens_came(generation)
            for told in generation.prompt_logprobs:
                yield pb.GenerateResponse(prompt_logprobs=told)
            generation.told_of_prompt()
            if generation.admitted.wants_no_token:
                # It was drawn for nothing, and nobody is told of it.
                generation.drop_tokens()
                break
            decoder = decoder_of()
            yield pb.GenerateResponse(chunk=_chunk(generation, decoder, run))
            if decoder is not None and decoder.stopped:
                break
    decoder = decoder_of()
    text = _last_text(generation, decoder)
    report.finished()
    stop = decoder.stop if decoder is not None else None
    yield pb.GenerateResponse(finished=_finished(generation, text, stop))


def _started(generation: Generation, cluster: Cluster) -> pb.GenerateStarted:
    admitted = generation.admitted
    return pb.GenerateStarted(
        request_id=generation.request_id,
        seed=admitted.params.seed,
        num_prompt_tokens=len(admitted.prompt_token_ids),
        model_digest=cluster.served.digest or "",
    )


def _new_decoder(
    codec: TextCodec | None,
    request: pb.GenerateRequest,
    admitted: AdmittedRequest,
    shown_token_ids: Collection[int],
) -> StreamDecoder | None:
    if codec is None:
        return None
    is_standalone = request.standalone_text or request.WhichOneof("prompt") == "messages"
    if admitted.constraint is not None and not admitted.constraint.HasField("begin_after"):
        # Its text is shown as the constraint has it, with a space in front if that has one.
        is_standalone = False
    return StreamDecoder(
        codec,
        admitted.params.stops,
        prompt=() if is_standalone else admitted.prompt_token_ids,
        end_token_ids=admitted.params.stop_token_ids,
        shown_token_ids=shown_token_ids,
        min_tokens=admitted.params.min_tokens,
        include_stop=admitted.params.include_stop,
        skip_special=admitted.params.skip_special_tokens,
    )


def _finished_before(generation: Generation, decoder_of: Decoder) -> FinishReason | None:
    """Whether the tokens that a resuming client has are the whole answer already."""
    received, params = generation.received, generation.admitted.params
    if not received:
        return None
    if (decoder := decoder_of()) is not None:
        decoder.push(received)
        if decoder.stopped:
            return FinishReason.STOP
    if received[-1] in params.stop_token_ids:
        return FinishReason.STOP
    is_full = len(received) >= params.max_tokens
    return FinishReason.LENGTH if is_full else None


def _chunk(
    generation: Generation, decoder: StreamDecoder | None, run: list[int]
) -> pb.GenerateChunk:
    """New tokens and the text that they make certain; what follows a stop string is cut off."""
    first_index = len(generation.token_ids) - len(run)
    chunk = pb.GenerateChunk(first_index=first_index, sample=generation.sample)
    if decoder is not None:
        delta = decoder.push(run)
        chunk.text = delta.text
        if delta.stopped:
            del generation.token_ids[chunk.first_index + delta.num_tokens_used :]
            run = run[: delta.num_tokens_used]
    chunk.token_ids.extend(run)
    chunk.logprobs.extend(generation.logprobs[: len(run)])
    generation.logprobs.clear()
    return chunk


def _last_text(generation: Generation, decoder: StreamDecoder | None) -> str | None:
    """The text that was held back; it may turn out that the answer ends with a stop string."""
    if decoder is None:
        return None
    text = decoder.finish()
    if decoder.stopped:
        generation.finish_reason = FinishReason.STOP
    return text


def _finished(generation: Generation, text: str | None, stop: str | None) -> pb.GenerateFinished:
    admitted, num_new = generation.admitted, generation.num_new
    finished = pb.GenerateFinished(
        finish_reason=FINISH_REASON_TO_PB[generation.finish_reason],
        usage=pb.Usage(
            num_prompt_tokens=len(admitted.prompt_token_ids),
            num_completion_tokens=len(generation.token_ids),
            num_cached_tokens=generation.num_cached_tokens,
            # A stop string may have cut some of them off.
            num_accepted_prediction_tokens=min(
                generation.num_accepted_prediction_tokens, len(generation.token_ids)
            ),
            num_rejected_prediction_tokens=generation.num_rejected_prediction_tokens,
        ),
        prefill_worker_id=generation.prefill_worker_id,
        decode_worker_id=generation.decode_worker_id,
        num_attempts=generation.num_attempts,
        sample=generation.sample,
        stop=stop,
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
            _log_failure(generation, error)
            num_engine_failures += isinstance(error, EngineFailure)
            _give_up_when_hopeless(generation, error, num_engine_failures)
            generation.distrust |= isinstance(error, DigestMismatch)
            counters["extra_attempts"] += 1
            metrics.extra_attempts.labels(cause(error)).inc()
            await asyncio.sleep(_PAUSE_S)


def _log_failure(generation: Generation, error: BatonError) -> None:
    log_event(
        logger,
        logging.WARNING,
        "attempt failed",
        request_id=generation.request_id,
        sample=generation.sample or None,
        attempt=generation.num_attempts,
        cause=cause(error),
        num_tokens=generation.num_new,
        prefill=generation.prefill_worker_id or None,
        decode=generation.decode_worker_id or None,
        message=error.message,
    )


def _give_up_when_hopeless(
    generation: Generation, error: BatonError, num_engine_failures: int
) -> None:
    """Raises what the client gets, when another attempt would hardly end otherwise."""
    if num_engine_failures >= _MAX_ENGINE_FAILURES:
        raise error
    if generation.num_fruitless >= _MAX_FRUITLESS:
        message = f"{_MAX_FRUITLESS} attempts in a row brought no token; the last: {error.message}"
        raise TooManyAttempts(message) from error
