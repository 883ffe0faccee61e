"""The one table of limits, and the check of every field of a request against it.

Nothing is allocated, counted or sent before `admit` has returned.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from baton.shared.kv.sequence import SamplingParams
from baton.shared.rpc.errors import InvalidField, NoTokenizer
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2

Encode = Callable[[str], Awaitable[Sequence[int]]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for. Lengths of stops count characters, those of text bytes."""

    vocab_size: int
    max_model_len: int
    """Tokens, prompt and answer together."""
    max_pool_tokens: int | None
    """Tokens that the largest block pool holds; None while no worker is known."""
    default_max_tokens: int = 256
    max_temperature: float = 100.0
    max_text_bytes: int = 1 << 20
    max_num_stops: int = 16
    max_stop_length: int = 256
    max_num_stop_token_ids: int = 64


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """A request whose every field holds."""

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    stops: tuple[str, ...]
    received: tuple[int, ...]
    """Generated tokens that the client already has; at most `params.max_tokens`."""


async def admit(
    request: pb.GenerateRequest,
    limits: Limits,
    *,
    encode: Encode | None,
    draw_seed: Callable[[], int] = lambda: secrets.randbits(64),
) -> AdmittedRequest:
    """Awaits nothing but `encode`, and that only when all else about the request holds.

    `encode` turns a prompt into token ids; None when the model has no tokenizer.

    Raises InvalidField naming field and limit; NoTokenizer for text or stop strings without one.
    """
    sampling = request.sampling
    _check_ranges(sampling, limits)
    stops = _check_stops(sampling, limits, has_tokenizer=encode is not None)
    _check_stop_token_ids(sampling, limits)
    received = tuple(request.received_token_ids)
    check_token_ids("received_token_ids", received, limits)
    temperature = sampling.temperature if sampling.HasField("temperature") else 1.0
    has_seed = sampling.HasField("seed")
    if received and temperature > 0 and not has_seed:
        limit = "the seed that the first message told"
        raise InvalidField("sampling.seed", "is missing for resuming a sampled answer", limit=limit)

    prompt_field = request.WhichOneof("prompt") or "prompt"
    prompt = await _prompt_token_ids(request, limits, encode)
    max_tokens = _check_lengths(prompt_field, len(prompt), sampling, limits)
    if len(received) > max_tokens:
        problem = f"has {len(received)} tokens, more than the whole answer"
        raise InvalidField("received_token_ids", problem, limit=f"max_tokens, {max_tokens}")

    params = SamplingParams(
        temperature=temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        min_p=sampling.min_p,
        seed=sampling.seed if has_seed else draw_seed(),
        max_tokens=max_tokens,
        stop_token_ids=frozenset(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
    )
    return AdmittedRequest(prompt, params, stops, received)


def _check_ranges(sampling: types_pb2.SamplingParams, limits: Limits) -> None:
    # Comparisons with NaN are false, so each says what is accepted.
    if not 0 <= sampling.temperature <= limits.max_temperature:
        limit = f"0 to {limits.max_temperature:g}"
        raise InvalidField("sampling.temperature", f"is {sampling.temperature:g}", limit=limit)
    if sampling.HasField("top_p") and not 0 < sampling.top_p <= 1:
        limit = "above 0, at most 1"
        raise InvalidField("sampling.top_p", f"is {sampling.top_p:g}", limit=limit)
    if not 0 <= sampling.top_k <= limits.vocab_size:
        limit = f"0 to the vocabulary's size, {limits.vocab_size}"
        raise InvalidField("sampling.top_k", f"is {sampling.top_k}", limit=limit)
    if not 0 <= sampling.min_p <= 1:
        raise InvalidField("sampling.min_p", f"is {sampling.min_p:g}", limit="0 to 1")
    if sampling.HasField("max_tokens") and sampling.max_tokens < 1:
        raise InvalidField("sampling.max_tokens", "is 0", limit="at least 1")


def _check_stops(
    sampling: types_pb2.SamplingParams, limits: Limits, *, has_tokenizer: bool
) -> tuple[str, ...]:
    stops = tuple(sampling.stops)
    if stops and not has_tokenizer:
        raise NoTokenizer("sampling.stops needs text, and the model has no tokenizer")
    if len(stops) > limits.max_num_stops:
        limit = f"{limits.max_num_stops} texts"
        raise InvalidField("sampling.stops", f"has {len(stops)} texts", limit=limit)
    for index, stop in enumerate(stops):
        if not 1 <= len(stop) <= limits.max_stop_length:
            limit = f"1 to {limits.max_stop_length} characters"
            problem = f"has {len(stop)} characters"
            raise InvalidField(f"sampling.stops[{index}]", problem, limit=limit)
    return stops


def _check_stop_token_ids(sampling: types_pb2.SamplingParams, limits: Limits) -> None:
    field = "sampling.stop_token_ids"
    if len(sampling.stop_token_ids) > limits.max_num_stop_token_ids:
        problem = f"has {len(sampling.stop_token_ids)} tokens"
        raise InvalidField(field, problem, limit=f"{limits.max_num_stop_token_ids} tokens")
    check_token_ids(field, sampling.stop_token_ids, limits)


def check_token_ids(field: str, token_ids: Sequence[int], limits: Limits) -> None:
    if max(token_ids, default=0) < limits.vocab_size:
        return
    for index, token_id in enumerate(token_ids):
        if token_id >= limits.vocab_size:
            limit = f"below the vocabulary's size, {limits.vocab_size}"
            raise InvalidField(f"{field}[{index}]", f"is {token_id}", limit=limit)


async def _prompt_token_ids(
    request: pb.GenerateRequest, limits: Limits, encode: Encode | None
) -> tuple[int, ...]:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidField("prompt", "is missing", limit="text or token_ids")
    if kind == "text":
        return await _encoded(request.text, limits, encode)
    token_ids = tuple(request.token_ids.token_ids)
    if not token_ids:
        raise InvalidField("token_ids", "is empty", limit="at least 1 token")
    # Before its length: an id that the model lacks says more about a wrong caller.
    check_token_ids("token_ids", token_ids, limits)
    return token_ids


def check_text(field: str, text: str, limits: Limits) -> None:
    num_bytes = len(text.encode())
    if num_bytes > limits.max_text_bytes:
        limit = f"{limits.max_text_bytes} bytes"
        raise InvalidField(field, f"has {num_bytes} bytes", limit=limit)


async def _encoded(text: str, limits: Limits, encode: Encode | None) -> tuple[int, ...]:
    if encode is None:
        raise NoTokenizer("text needs a tokenizer, and the model has none: send token_ids")
    if not text:
        raise InvalidField("text", "is empty", limit="at least 1 character")
    check_text("text", text, limits)
    token_ids = tuple(await encode(text))
    if not token_ids:
        raise InvalidField("text", "gives no token", limit="at least 1 token")
    if max(token_ids) >= limits.vocab_size:
        problem = f"gives token {max(token_ids)}, which the tokenizer knows and the model does not"
        raise InvalidField("text", problem, limit=f"below {limits.vocab_size}")
    return token_ids


def _check_lengths(
    prompt_field: str, num_prompt: int, sampling: types_pb2.SamplingParams, limits: Limits
) -> int:
    """The answer's number of tokens: the client's, or the default as far as it fits."""
    room, limit = room_for_answer(num_prompt, limits)
    if room < 1:
        problem = f"has {num_prompt} tokens, which leaves no room for an answer"
        raise InvalidField(prompt_field, problem, limit=limit)
    if not sampling.HasField("max_tokens"):
        return min(limits.default_max_tokens, room)
    if sampling.max_tokens > room:
        problem = f"is {sampling.max_tokens}, after a prompt of {num_prompt}"
        raise InvalidField("sampling.max_tokens", problem, limit=limit)
    return sampling.max_tokens


def room_for_answer(num_prompt: int, limits: Limits) -> tuple[int, str]:
    """Tokens that fit after a prompt of `num_prompt`, below 1 for none; and what limits them."""
    if limits.max_pool_tokens is not None and limits.max_pool_tokens < limits.max_model_len:
        limit = f"prompt and answer together {limits.max_pool_tokens}, the largest block pool"
        return limits.max_pool_tokens - num_prompt, limit
    limit = f"prompt and answer together {limits.max_model_len}, the model's length"
    return limits.max_model_len - num_prompt, limit
