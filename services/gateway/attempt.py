"""One attempt at an answer: on one prefill worker P and one decode worker D, or on D alone.

Only the current attempt's tokens are taken, and of them only the next index.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from functools import partial

from baton.services.gateway.admission import AdmittedRequest
from baton.services.gateway.cluster import Cluster
from baton.services.gateway.generation import Generation
from baton.services.gateway.links import (
    DecodeLink,
    Event,
    Events,
    Failed,
    Joined,
    PredictionChecked,
    PromptAdmitted,
    PromptTold,
    Token,
    follow_prefill,
)
from baton.services.gateway.router import Route
from baton.shared.kv.sequence import AttemptKey
from baton.shared.rpc.convert import add_sequence, duration_to_pb, key_to_pb, sampling_to_pb
from baton.shared.rpc.errors import SourceLost
from baton.v1 import prefill_service_pb2, types_pb2

_MAX_PATIENCE_DOUBLINGS = 5


async def run_attempt(generation: Generation, cluster: Cluster) -> AsyncGenerator[list[int], None]:
    """Runs of new tokens, from one try on one route. Raises what ended it; however it ends, it is
    cancelled on P and D."""
    token_ids = [*generation.admitted.prompt_token_ids, *generation.token_ids]
    # One that is drawn for nothing is not stored.
    num_new_tokens = 0 if generation.admitted.wants_no_token else generation.num_left
    route = await cluster.routing.route(
        token_ids,
        num_new_tokens,
        generation.capability_hash,
        salt=generation.admitted.identity.cache_salt,
        has_begun=generation.has_begun,
        begun_on=generation.model_digest,
        beside=generation.beside,
    )
    generation.routed_at = generation.routed_at or time.monotonic()
    attempt = _Attempt(generation, cluster, route)
    try:
        await attempt.start()
        while generation.finish_reason is None:
            run, failure = attempt.take(await _all_there(attempt.events))
            if run:
                attempt.tokens_came()
                yield run
            if failure is not None and generation.finish_reason is None:
                attempt.cast_doubt(failure)
                raise failure.error
    finally:
        attempt.end()


async def _all_there(events: Events) -> list[Event]:
    """At least one; tokens that piled up go out as one message."""
    taken = [await events.get()]
    while not events.empty():
        taken.append(events.get_nowait())
    return taken


class _Attempt:
    def __init__(self, generation: Generation, cluster: Cluster, route: Route) -> None:
        self._generation, self._cluster, self._route = generation, cluster, route
        self._key = AttemptKey(generation.request_id, generation.sample, generation.num_attempts)
        self.events: Events = asyncio.Queue()
        self._failures: list[Failed] = []
        """At most one of each worker."""
        self._early: list[Token] = []
        """Came before all of the prompt's logprobs did, which come first."""
        self._is_prompt_open = True
        self._prefill: asyncio.Task[None] | None = None
        self._link: DecodeLink | None = None
        self._number = 0
        """On the link."""

    async def start(self) -> None:
        """On P, whose prompt is on its way first, and D; their events come from now on."""
        generation, route = self._generation, self._route
        # When one token is left it comes from P: nobody has to take the blocks over.
        wants_decode = route.prefill is None or generation.num_left > 1
        generation.prefill_worker_id = route.prefill.worker_id if route.prefill else ""
        generation.decode_worker_id = route.decode.worker_id if wants_decode else ""
        patience = 2.0 ** min(generation.num_fruitless - 1, _MAX_PATIENCE_DOUBLINGS)
        spec = self._sequence_spec()
        if route.prefill is not None:
            request = prefill_service_pb2.PrefillRequest(unclaimed=not wants_decode)
            add_sequence(request.sequence, spec)
            call = follow_prefill(
                self._cluster.prefill_calls(route.prefill),
                route.prefill.incarnation,
                request,
                self.events,
                patience,
            )
            self._prefill = asyncio.create_task(call)
            await asyncio.sleep(0)
        if wants_decode:
            self._link = self._cluster.link(route.decode)
            self._number = self._link.start(spec, _source(route), self.events, patience)

    def take(self, events: list[Event]) -> tuple[list[int], Failed | None]:
        """Keeps what they say; returns the new tokens, and the failure that ends the attempt."""
        generation = self._generation
        run: list[int] = []
        tokens, self._early = self._early, []
        for event in events:
            match event:
                case Token():
                    tokens.append(event)
                case PromptTold(logprobs):
                    generation.take_prompt_logprobs(logprobs)
                case PromptAdmitted(num_cached_tokens):
                    self._note_cached(num_cached_tokens)
                    if generation.num_attempts == 1:
                        generation.prefill_admitted_at = time.monotonic()
                case Joined(num_cached_tokens, transfer_s):
                    generation.transfer_s = transfer_s
                    if self._route.prefill is None:
                        self._note_cached(num_cached_tokens)
                case PredictionChecked(num_accepted, num_rejected):
                    generation.num_accepted_prediction_tokens += num_accepted
                    generation.num_rejected_prediction_tokens += num_rejected
                case Failed():
                    self._failures.append(event)
        if generation.lacks_prompt_logprobs:
            # D was quicker with the first token than P, which has them.
            self._early = tokens
            return run, self._ending_failure(is_computed=not self._is_prompt_open)
        for token in tokens:
            # P and D both bring the first token; what came before is not the next.
            is_next = token.index == len(generation.token_ids)
            if is_next and generation.finish_reason is None:
                generation.token_ids.append(token.token_id)
                generation.finish_reason = token.finish_reason
                run.append(token.token_id)
                if token.logprobs is not None:
                    generation.logprobs.append(token.logprobs)
        return run, self._ending_failure(is_computed=bool(run) or not self._is_prompt_open)

    def _ending_failure(self, *, is_computed: bool) -> Failed | None:
        """The first that its worker knows of by itself.

        Hearsay may overtake the word of the worker that it is about, which may even be that the
        answer is whole: P ends a sequence with its first token, and D's claim with it. So hearsay
        counts only when that worker has said all that it will: its failure, or, once the prompt
        is computed, P's token.
        """
        for failure in self._failures:
            if not failure.is_hearsay:
                return failure
        num_workers = (self._prefill is not None) + (self._link is not None)
        if is_computed or len(self._failures) == num_workers:
            return next(iter(self._failures), None)
        return None

    def tokens_came(self) -> None:
        generation, now = self._generation, time.monotonic()
        self._end_prompt()
        generation.capability_hash = self._route.decode.capability_hash
        generation.model_digest = self._route.decode.model_digest
        generation.first_token_at = generation.first_token_at or now
        generation.last_token_at = now
        if generation.prompt is not None:
            generation.prompt.note_computed(self._route, generation.num_cached_tokens)

    def cast_doubt(self, failure: Failed) -> None:
        """On the worker that failed, if one did."""
        prefill = self._route.prefill
        if failure.worker_incarnation is not None:
            self._cluster.workers.doubt(failure.worker_incarnation)
        elif isinstance(failure.error, SourceLost) and prefill is not None:
            self._cluster.workers.doubt(prefill.incarnation)

    def end(self) -> None:
        self._end_prompt()
        if self._prefill is not None:
            self._prefill.cancel()
        if self._link is not None:
            self._link.end(self._number, self._key)

    def _end_prompt(self) -> None:
        if self._is_prompt_open:
            self._is_prompt_open = False
            self._cluster.routing.prompt_ended(self._route)

    def _note_cached(self, num_cached_tokens: int) -> None:
        """Later attempts, and samples, find what earlier ones computed; that is not the client's
        prefix."""
        if self._generation.num_attempts == 1 and self._generation.computes_prompt:
            self._generation.num_cached_tokens = num_cached_tokens

    def _sequence_spec(self) -> types_pb2.SequenceSpec:
        generation = self._generation
        admitted, prompt = generation.admitted, generation.prompt
        if prompt is None:
            spec = _spec_of(admitted)
        else:
            spec = types_pb2.SequenceSpec()
            add_sequence(spec, prompt.spec(partial(_spec_of, admitted)))
        spec.key.CopyFrom(key_to_pb(self._key))
        spec.token_ids.extend(generation.token_ids)
        spec.first_index = len(generation.token_ids)
        if not generation.lacks_prompt_logprobs:
            spec.sampling.ClearField("prompt_logprobs")
        spec.distrust = generation.distrust
        spec.capability_hash = self._route.decode.capability_hash
        if generation.deadline is not None:
            time_left_s = max(0.0, generation.deadline - time.monotonic())
            spec.time_left.CopyFrom(duration_to_pb(time_left_s))
        return spec


def _spec_of(admitted: AdmittedRequest) -> types_pb2.SequenceSpec:
    """What all attempts at all samples have in common."""
    spec = types_pb2.SequenceSpec(
        sampling=sampling_to_pb(admitted.params),
        cache_salt=admitted.identity.cache_salt,
        prediction_token_ids=admitted.prediction_token_ids,
        banned_sequences=[
            types_pb2.TokenRun(token_ids=token_ids) for token_ids in admitted.banned_sequences
        ],
        constraint=admitted.constraint,
    )
    if admitted.sent_token_ids is not None:
        spec.token_ids.MergeFrom(admitted.sent_token_ids)
    else:
        spec.token_ids.extend(admitted.prompt_token_ids)
    return spec


def _source(route: Route) -> types_pb2.WorkerAddress | None:
    if route.prefill is None:
        return None
    return types_pb2.WorkerAddress(
        worker_id=route.prefill.worker_id,
        incarnation=route.prefill.incarnation,
        address=route.prefill.address,
    )
