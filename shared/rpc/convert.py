"""Between messages and the engine's own types."""

from __future__ import annotations

import time

from google.protobuf.duration_pb2 import Duration

from baton.shared.kv.sequence import AttemptKey, FinishReason, SamplingParams, Sequence
from baton.v1 import types_pb2 as pb

FINISH_REASON_TO_PB = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
FINISH_REASON_FROM_PB = {value: key for key, value in FINISH_REASON_TO_PB.items()}

ROLE_TO_PB = {
    "prefill": pb.WORKER_ROLE_PREFILL,
    "decode": pb.WORKER_ROLE_DECODE,
    "both": pb.WORKER_ROLE_BOTH,
}


def key_to_pb(key: AttemptKey) -> pb.AttemptKey:
    return pb.AttemptKey(request_id=key.request_id, sample=key.sample, attempt=key.attempt)


def key_from_pb(key: pb.AttemptKey) -> AttemptKey:
    return AttemptKey(key.request_id, key.sample, key.attempt)


def duration_to_pb(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration


def duration_from_pb(duration: Duration) -> float:
    return duration.seconds + duration.nanos * 1e-9


def sampling_to_pb(params: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=params.seed,
        max_tokens=params.max_tokens,
        stop_token_ids=sorted(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
    )


def sampling_from_pb(params: pb.SamplingParams) -> SamplingParams:
    """Of a SequenceSpec, where every field is set."""
    return SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=params.seed,
        max_tokens=params.max_tokens,
        stop_token_ids=frozenset(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
    )


def sequence_from_pb(spec: pb.SequenceSpec) -> Sequence:
    """The deadline is set on this process's monotonic clock."""
    deadline = None
    if spec.HasField("time_left"):
        deadline = time.monotonic() + duration_from_pb(spec.time_left)
    return Sequence(
        key=key_from_pb(spec.key),
        prompt_token_ids=tuple(spec.token_ids),
        params=sampling_from_pb(spec.sampling),
        first_index=spec.first_index,
        salt=spec.cache_salt,
        distrust=spec.distrust,
        deadline=deadline,
    )
