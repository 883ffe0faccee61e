"""The check of every field of a request against its limit.

What a sampling field may be is declared with it (shared/sampling.py); the other limits are here.
Nothing is allocated, counted or sent before `admit` has returned.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from baton.services.gateway.identity import ANONYMOUS, Identity
from baton.services.gateway.token_bans import (
    TokenSequences,
    banned_sequences,
    check_a_token_is_left,
)
from baton.shared.rpc.convert import given_fields, sampling_from_pb
from baton.shared.rpc.errors import InvalidField, NoTokenizer
from baton.shared.sampling import Broken, Kind, SamplingParams, unknown_token
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2

Encode = Callable[[str], Awaitable[Sequence[int]]]
CheckConstraint = Callable[[types_pb2.Constraint], Awaitable[None]]
EncodeChat = Callable[[Sequence[Mapping[str, Any]]], Awaitable[Sequence[int]]]

MAX_SAMPLES = 128
"""Of one request. Each costs the gateway a task and its tokens, before workers have any of it."""
MAX_PROMPT_LOGPROBS = 1 << 19
"""Own ones and those of the likeliest: some megabytes in messages, tens of them in JSON."""

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for, as far as it depends on the model and the cluster."""

    vocab_size: int
    max_model_len: int
    """Tokens, prompt and answer together."""
    max_pool_tokens: int | None
    """Tokens that the largest block pool holds; None while no worker is known."""
    max_cluster_tokens: int | None = None
    """Tokens that the pools of all workers that decode hold; None as above."""
    default_max_tokens: int = 256
    max_text_bytes: int = 1 << 20
    media_tokens: Mapping[int, str] = field(default_factory=dict)
    """Tokens in whose place an image, a video or audio would be read → the model's name of each."""


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """What the model's own files say for requests that do not say otherwise."""

    eos_token_ids: frozenset[int] = frozenset()
    """Become stop tokens, unless a request ignores them."""
    sampling: types_pb2.SamplingParams = field(default_factory=types_pb2.SamplingParams)
    """Fields that it has are for requests that lack them."""


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """A request whose every field holds."""

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    received: tuple[tuple[int, ...], ...]
    """By sample: generated tokens that the client already has; at most `params.max_tokens`."""
    identity: Identity = ANONYMOUS
    prediction_token_ids: tuple[int, ...] = ()
    """What the client expects the answer to be."""
    banned_sequences: TokenSequences = ()
    """Of `bad_words`."""
    constraint: types_pb2.Constraint | None = None
    """Which texts the answer may be; None: any."""
    wants_no_token: bool = False
    """The prompt's logprobs are the whole answer: `params.max_tokens` is 1, as workers draw one
    behind every prompt."""
    sent_token_ids: Sequence[int] | None = field(default=None, compare=False, repr=False)
    """The prompt as the list of a message, if it was sent so: into another message it is copied as
    it is."""

    @property
    def num_samples(self) -> int:
        return len(self.received)


async def admit(
    request: pb.GenerateRequest,
    limits: Limits,
    *,
    encode: Encode | None,
    encode_chat: EncodeChat | None = None,
    encode_answer: Encode | None = None,
    check_constraint: CheckConstraint | None = None,
    defaults: ModelDefaults = ModelDefaults(),
    identity: Identity = ANONYMOUS,
    draw_seed: Callable[[], int] = lambda: secrets.randbits(64),
) -> AdmittedRequest:
    """Awaits nothing but these, and that only when all else about the request holds.

    `encode` and `encode_chat` turn a prompt, or a chat's messages, into token ids, `encode_answer`
    a text of an answer: what the client expects, and bad words; `check_constraint` refuses what
    workers could not follow. None when the model has no tokenizer.

    Raises InvalidField naming field and limit; NoTokenizer for text or stop strings without one,
    and what `encode_chat` raises.
    """
    _check_sampling(request.sampling, limits, has_tokenizer=encode is not None)
    if request.HasField("constraint") and (encode is None or check_constraint is None):
        raise NoTokenizer("constraint needs a tokenizer, and the model has none")
    sampling = types_pb2.SamplingParams()
    sampling.CopyFrom(defaults.sampling)
    sampling.MergeFrom(request.sampling)
    params = sampling_from_pb(sampling)
    received = _received(request, limits)
    has_seed = request.sampling.HasField("seed")
    if any(received.values()) and params.temperature > 0 and not has_seed:
        limit = "the seed that the first message told"
        raise InvalidField("sampling.seed", "is missing for resuming a sampled answer", limit=limit)

    prompt_field = request.WhichOneof("prompt") or "prompt"
    prompt = await _prompt_token_ids(request, limits, encode, encode_chat)
    _check_is_text(prompt_field, prompt, limits)
    default_max_tokens = defaults.sampling.max_tokens or limits.default_max_tokens
    max_tokens = _check_lengths(
        prompt_field, len(prompt), len(received), request, limits, default_max_tokens
    )
    check_num_logprobs("sampling.prompt_logprobs", params.prompt_logprobs, len(prompt))
    for name, token_ids in received.items():
        if len(token_ids) > max_tokens:
            problem = f"has {len(token_ids)} tokens, more than the whole answer"
            raise InvalidField(name, problem, limit=f"max_tokens, {max_tokens}")

    if params.min_tokens > max_tokens:
        problem, limit = f"is {params.min_tokens}", f"max_tokens, {max_tokens}"
        raise InvalidField("sampling.min_tokens", problem, limit=limit)
    constraint = None
    if request.HasField("constraint") and check_constraint is not None:
        constraint = request.constraint
        await check_constraint(constraint)
    prediction = await _prediction_token_ids(request, limits, encode_answer)
    banned: TokenSequences = ()
    if params.bad_words:
        # Texts need a tokenizer: that was checked.
        assert encode_answer is not None
        banned = await banned_sequences(params.bad_words, limits.vocab_size, encode_answer)
    seed = params.seed if has_seed else draw_seed()
    ends = params.stop_token_ids
    # What has nothing left to say ends, whatever is ignored.
    if not params.ignore_eos or constraint is not None:
        ends |= defaults.eos_token_ids
    params = replace(
        params,
        seed=seed,
        max_tokens=max(max_tokens, 1),
        stop_token_ids=ends,
        # They came before the tokens that a resuming client has.
        prompt_logprobs=None if any(received.values()) else params.prompt_logprobs,
    )
    check_a_token_is_left(params, banned)
    return AdmittedRequest(
        prompt,
        params,
        tuple(received.values()),
        identity,
        prediction,
        banned,
        constraint,
        wants_no_token=max_tokens == 0,
        sent_token_ids=request.token_ids.token_ids if prompt_field == "token_ids" else None,
    )


def _received(request: pb.GenerateRequest, limits: Limits) -> dict[str, tuple[int, ...]]:
    """Of each sample, under the name of its field."""
    num_samples = request.n if request.HasField("n") else 1
    if not 1 <= num_samples <= MAX_SAMPLES:
        raise InvalidField("n", f"is {num_samples}", limit=f"1 to {MAX_SAMPLES}")
    single, each = request.received_token_ids, request.received_samples
    if single and (num_samples > 1 or each):
        problem = f"is of one sample, and n is {num_samples}"
        if num_samples == 1:
            problem = "is given twice, by received_samples as well"
        raise InvalidField("received_token_ids", problem, limit="received_samples alone")
    if not each:
        first = {"received_token_ids": tuple(single)}
        others = {f"received_samples[{number}]": () for number in range(1, num_samples)}
        received = first | others
    elif len(each) != num_samples:
        raise InvalidField("received_samples", f"has {len(each)}", limit=f"n, {num_samples}")
    else:
        received = {
            f"received_samples[{number}]": tuple(sample.token_ids)
            for number, sample in enumerate(each)
        }
    for name, token_ids in received.items():
        check_token_ids(name, token_ids, limits)
    return received


def _check_sampling(
    sampling: types_pb2.SamplingParams, limits: Limits, *, has_tokenizer: bool
) -> None:
    for given, value in given_fields(sampling):
        name = f"sampling.{given.name}"
        if given.kind is Kind.TEXTS and not has_tokenizer:
            raise NoTokenizer(f"{name} needs text, and the model has no tokenizer")
        if given.name == "max_tokens" and value == 0 and sampling.HasField("prompt_logprobs"):
            # Then something is asked of the prompt alone.
            continue
        if given.limit is not None:
            _refuse(name, given.limit(value, limits.vocab_size))


def _refuse(field: str, broken: Broken | None) -> None:
    if broken is not None:
        entry = "" if broken.entry is None else f"[{broken.entry}]"
        raise InvalidField(field + entry, broken.problem, limit=broken.limit)


def check_num_logprobs(field: str, num_top: int | None, num_tokens: int) -> None:
    """Of so many tokens of prompts. Raises InvalidField for more than an answer may hold."""
    if num_top is None:
        return
    num_logprobs = num_tokens * (1 + num_top)
    if num_logprobs > MAX_PROMPT_LOGPROBS:
        problem = f"is {num_top}, which of {num_tokens} tokens makes {num_logprobs} logprobs"
        raise InvalidField(field, problem, limit=f"{MAX_PROMPT_LOGPROBS} logprobs of a prompt")


def check_token_ids(field: str, token_ids: Sequence[int], limits: Limits) -> None:
    """Raises InvalidField."""
    _refuse(field, unknown_token(token_ids, limits.vocab_size))


async def _prompt_token_ids(
    request: pb.GenerateRequest,
    limits: Limits,
    encode: Encode | None,
    encode_chat: EncodeChat | None,
) -> tuple[int, ...]:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidField("prompt", "is missing", limit="text, token_ids or messages")
    if kind == "text":
        return await _encoded(request.text, limits, encode)
    if kind == "messages":
        return await _encoded_chat(request.messages.messages, limits, encode_chat)
    # By way of a list, which the library makes at once, and not token by token.
    token_ids = tuple(request.token_ids.token_ids[:])
    if not token_ids:
        raise InvalidField("token_ids", "is empty", limit="at least 1 token")
    # Before its length: an id that the model lacks says more about a wrong caller.
    check_token_ids("token_ids", token_ids, limits)
    return token_ids


def _check_is_text(field: str, prompt: Sequence[int], limits: Limits) -> None:
    """Raises InvalidField for what only a processor of images would have written."""
    index, found = min(
        ((prompt.index(each), each) for each in limits.media_tokens if each in prompt),
        default=(0, None),
    )
    if found is not None:
        name = limits.media_tokens[found]
        problem = f"has {name} {found} as token {index}: images, video and audio are not read"
        raise InvalidField(field, problem, limit="text alone")


async def _prediction_token_ids(
    request: pb.GenerateRequest, limits: Limits, encode_answer: Encode | None
) -> tuple[int, ...]:
    """Of a request that has none, none."""
    if not request.HasField("prediction"):
        return ()
    prediction = request.prediction
    match prediction.WhichOneof("content"):
        case "text":
            if encode_answer is None:
                raise NoTokenizer("prediction.text needs a tokenizer, and the model has none")
            field = "prediction.text"
            check_text(field, prediction.text, limits)
            token_ids = tuple(await encode_answer(prediction.text))
        case "token_ids":
            field, token_ids = "prediction.token_ids", tuple(prediction.token_ids.token_ids)
        case _:
            raise InvalidField("prediction", "is empty", limit="text or token_ids")
    check_token_ids(field, token_ids, limits)
    if len(token_ids) > limits.max_model_len:
        limit = f"{limits.max_model_len}, the model's length"
        raise InvalidField(field, f"has {len(token_ids)} tokens", limit=limit)
    return token_ids


def check_text(field: str, text: str, limits: Limits) -> None:
    # Of a text that is far too long, as templates may write one, not even the bytes are made.
    is_huge = len(text) > 4 * limits.max_text_bytes
    num_bytes = len(text) if is_huge else len(text.encode())
    if num_bytes > limits.max_text_bytes:
        limit = f"{limits.max_text_bytes} bytes"
        at_least = "at least " if is_huge else ""
        raise InvalidField(field, f"has {at_least}{num_bytes} bytes", limit=limit)


async def _encoded(text: str, limits: Limits, encode: Encode | None) -> tuple[int, ...]:
    if encode is None:
        raise NoTokenizer("text needs a tokenizer, and the model has none: send token_ids")
    check_text("text", text, limits)
    # Of an empty text too: the answer to it begins after the tokenizer's start token.
    token_ids = tuple(await encode(text))
    if not token_ids and not text:
        problem = "is empty, and the tokenizer adds no start token"
        raise InvalidField("text", problem, limit="at least 1 character")
    if not token_ids:
        raise InvalidField("text", "gives no token", limit="at least 1 token")
    _check_vocabulary("text", token_ids, limits)
    return token_ids


async def _encoded_chat(
    messages: Sequence[pb.Message], limits: Limits, encode_chat: EncodeChat | None
) -> tuple[int, ...]:
    if encode_chat is None:
        raise NoTokenizer("messages need a tokenizer, and the model has none: send token_ids")
    if not messages:
        raise InvalidField("messages", "are missing", limit="at least 1 message")
    for index, message in enumerate(messages):
        if message.role not in _ROLES:
            problem = f"is {message.role[:40]!r}"
            raise InvalidField(f"messages[{index}].role", problem, limit=", ".join(_ROLES))
    token_ids = tuple(
        await encode_chat([{"role": each.role, "content": each.content} for each in messages])
    )
    if not token_ids:
        raise InvalidField("messages", "give no token", limit="at least 1 token")
    _check_vocabulary("messages", token_ids, limits)
    return token_ids


def _check_vocabulary(field: str, token_ids: Sequence[int], limits: Limits) -> None:
    if max(token_ids) >= limits.vocab_size:
        problem = f"gives token {max(token_ids)}, which the tokenizer knows and the model does not"
        raise InvalidField(field, problem, limit=f"below {limits.vocab_size}")


class ChatCodec(Protocol):
    """The part of a TextCodec that makes a prompt of a chat."""

    async def render_chat_async(
        self, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> str: ...

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


class ChatPrompt(NamedTuple):
    text: str
    token_ids: list[int]


async def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    limits: Limits,
    codec: ChatCodec,
    *,
    add_special_tokens: bool = False,
    **options: Any,
) -> ChatPrompt:
    """The prompt of a chat, by the model's own template, which puts special tokens in. `options`:
    those of TextCodec.render_chat.

    Raises InvalidField and NoChatTemplate.
    """
    # Before anything is made of them, and after: templates may say things twice.
    for message in messages:
        check_text("messages", _text_of(message["content"]), limits)
    text = await codec.render_chat_async(messages, **options)
    check_text("messages", text, limits)
    token_ids = await codec.encode_async(text, add_special_tokens=add_special_tokens)
    return ChatPrompt(text, token_ids)


async def chat_token_ids(
    messages: Sequence[Mapping[str, Any]], limits: Limits, codec: ChatCodec
) -> list[int]:
    """Those of `chat_prompt`."""
    return (await chat_prompt(messages, limits, codec)).token_ids


def _text_of(content: str | Sequence[Mapping[str, str]] | None) -> str:
    """Of a message's content, which may be a list of parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content)


def _check_lengths(
    prompt_field: str,
    num_prompt: int,
    num_samples: int,
    request: pb.GenerateRequest,
    limits: Limits,
    default_max_tokens: int,
) -> int:
    """An answer's number of tokens: the client's, or the default as far as it fits."""
    length, what = limits.max_model_len, "the model's length"
    if limits.max_pool_tokens is not None and limits.max_pool_tokens < length:
        length, what = limits.max_pool_tokens, "the largest block pool"
    limit = f"prompt and answer together {length}, {what}"
    room = length - num_prompt
    context_length: int | None = length
    sampling = request.sampling
    # Who asks of the prompt alone needs none.
    least = 0 if sampling.HasField("max_tokens") and sampling.max_tokens == 0 else 1
    if room < least:
        problem = f"has {num_prompt} tokens, which leaves no room for an answer"
        raise InvalidField(prompt_field, problem, limit=limit, context_length=length)
    after = f"after a prompt of {num_prompt}"
    # Samples share the prompt's blocks.
    if num_samples > 1 and limits.max_cluster_tokens is not None:
        share = (limits.max_cluster_tokens - num_prompt) // num_samples
        if share < room:
            room, context_length = share, None
            limit = f"prompt and all answers together {limits.max_cluster_tokens}, all block pools"
            after = f"in each of {num_samples} samples, {after}"
        if room < least:
            problem = f"is {num_samples}, after a prompt of {num_prompt}"
            raise InvalidField("n", problem, limit=limit)
    if not sampling.HasField("max_tokens"):
        return min(default_max_tokens, room)
    if sampling.max_tokens > room and not request.clamp_max_tokens:
        problem = f"is {sampling.max_tokens}, {after}"
        raise InvalidField(
            "sampling.max_tokens", problem, limit=limit, context_length=context_length
        )
    return min(sampling.max_tokens, room)
