"""Between messages and the engine's own types."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from google.protobuf.duration_pb2 import Duration

from baton.shared.kv.drawn import TokenLogprobs
from baton.shared.kv.sequence import AttemptKey, FinishReason, Sequence
from baton.shared.rpc.errors import CapabilityMismatch
from baton.shared.sampling import FIELDS, Kind, SamplingField, SamplingParams
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


def add_sequence(to: pb.SequenceSpec, spec: pb.SequenceSpec) -> None:
    """Makes an empty message the same as `spec`. The library copies a message by writing and
    reading it, which takes milliseconds for a long prompt; a list of numbers it copies as it is."""
    for field, value in spec.ListFields():
        if field.name == "token_ids":
            to.token_ids.MergeFrom(value)
        elif field.message_type is None and not field.is_repeated:
            setattr(to, field.name, value)
        else:
            getattr(to, field.name).MergeFrom(value)


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


_FIELD_BY_NAME = {field.name: field for field in FIELDS}


def sampling_to_pb(params: SamplingParams) -> pb.SamplingParams:
    """For a SequenceSpec: every field is set that workers apply."""
    values = {name: getattr(params, name) for name in _FOR_WORKERS}
    for name, to_pb in _TO_PB.items():
        values[name] = to_pb(values[name])
    return pb.SamplingParams(**values)


def sampling_from_pb(message: pb.SamplingParams) -> SamplingParams:
    """What is not set takes its default."""
    values = {
        field.name: _FROM_PB[field.kind](value) if field.kind in _FROM_PB else value
        for field, value in given_fields(message)
    }
    return SamplingParams(**values)


_FROM_PB: dict[Kind, Callable[[Any], Any]] = {
    Kind.TOKEN_IDS: frozenset,
    Kind.TEXTS: tuple,
    Kind.BIASES: lambda biases: tuple(sorted(biases.items())),
}
"""For kinds whose values have another type here than in a message."""
_FOR_WORKERS = [field.name for field in FIELDS if field.is_for_workers]
_TO_PB: dict[str, Callable[[Any], Any]] = {
    field.name: dict for field in FIELDS if field.is_for_workers and field.kind is Kind.BIASES
}
"""By field."""


def given_fields(message: pb.SamplingParams) -> Iterator[tuple[SamplingField, Any]]:
    """The sampling fields that are set, each with the message's value."""
    for descriptor, value in message.ListFields():
        yield _FIELD_BY_NAME[descriptor.name], value


def sampling_to_json(message: pb.SamplingParams) -> dict[str, Any]:
    """The sampling fields that are set, as HTTP requests write them."""
    return {field.public_name: _shown(value) for field, value in given_fields(message)}


def _shown(value: Any) -> Any:
    if isinstance(value, float):
        # 0.6 and not 0.6000000238: messages carry numbers in 32 bits.
        return float(f"{value:.7g}")
    if isinstance(value, Mapping):
        return {str(key): _shown(entry) for key, entry in sorted(value.items())}
    return value if isinstance(value, int) else list(value)


def logprobs_to_pb(told: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        logprob=told.logprob,
        rank=told.rank,
        top_token_ids=told.top_token_ids,
        top_logprobs=told.top_logprobs,
    )


def logprobs_from_pb(told: pb.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(
        told.logprob, told.rank, tuple(told.top_token_ids), tuple(told.top_logprobs)
    )


def sequence_from_pb(spec: pb.SequenceSpec, capability_hash: str) -> Sequence:
    """For a worker of that capability. The deadline is on this process's monotonic clock.

    Raises CapabilityMismatch when the gateway takes it for another.
    """
    if spec.capability_hash != capability_hash:
        raise CapabilityMismatch("this worker serves another model, layout or dtype")
    deadline = None
    if spec.HasField("time_left"):
        deadline = time.monotonic() + duration_from_pb(spec.time_left)
    return Sequence(
        key=key_from_pb(spec.key),
        # By way of a list, which the library makes at once, and not token by token.
        prompt_token_ids=tuple(spec.token_ids[:]),
        params=sampling_from_pb(spec.sampling),
        first_index=spec.first_index,
        salt=spec.cache_salt,
        prediction_token_ids=tuple(spec.prediction_token_ids),
        banned_sequences=tuple(tuple(each.token_ids) for each in spec.banned_sequences),
        constraint=spec.constraint.SerializeToString() if spec.HasField("constraint") else b"",
        distrust=spec.distrust,
        deadline=deadline,
    )
