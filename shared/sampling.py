"""How tokens are drawn: every field that a request may set, declared once.

A field is a line of `SamplingParams` below, and the field of the same name in types.proto. All that
carries it follows from the declaration:

    gRPC              default, range and the words of a refusal      services/gateway/admission.py
    HTTP              its name and type in a body                    services/gateway/openai/
    `baton generate`  its flag                                       services/launcher/
    workers           message ⇄ SamplingParams                       shared/rpc/convert.py

What computes it reads `SamplingParams`: the sampler (shared/engine/), or, for what works on text,
the gateway.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

_T = TypeVar("_T")


class Kind(enum.Enum):
    """What a field holds: its type here, and in the contract."""

    NUMBER = "float: float"
    COUNT = "int: uint32"
    MAYBE_COUNT = "int | None: uint32"
    """None: not asked for, which is not the same as 0."""
    SEED = "int: uint64"
    SWITCH = "bool: bool"
    TOKEN_IDS = "frozenset[int]: repeated uint32"
    TEXTS = "tuple[str, ...]: repeated string"
    BIASES = "tuple[tuple[int, float], ...]: map<uint32, float>"
    """A number for each of some tokens, in the tokens' order."""


class Broken(NamedTuple):
    """What is wrong with a value."""

    problem: str
    limit: str
    """What would have been accepted."""
    entry: int | None = None
    """Which one of several is meant; None: the whole."""


Limit = Callable[[Any, int], Broken | None]
"""(value, the vocabulary's size) → what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """How HTTP clients write a field, where it is not as in the contract."""

    name: str | None = None
    lowest: int = 0
    """Of a whole number."""
    fewest: int = 0
    """Of a list: entries, where one is given."""
    read: Callable[[Any], Any] = lambda value: value
    """What they write → what the contract has; None: as if they had not given it."""


@dataclass(frozen=True, slots=True)
class SamplingField:
    """A field's declaration."""

    name: str
    """Of the attribute, and in the contract."""
    kind: Kind
    default: Any
    """Of a request that leaves it out; admission may have a better one for each."""
    limit: Limit | None
    help: str
    metavar: str | None
    spelling: Spelling
    is_for_workers: bool
    """Else the gateway applies it by itself, and workers see the default."""

    @property
    def public_name(self) -> str:
        """Over HTTP; with dashes, the flag's."""
        return self.spelling.name or self.name


def declared(
    kind: Kind,
    default: _T,
    *,
    help: str,
    limit: Limit | None = None,
    metavar: str | None = None,
    spelling: Spelling = Spelling(),
    is_for_workers: bool = True,
) -> _T:
    """A field of `SamplingParams`; the arguments are those of `SamplingField`."""
    about = {
        "kind": kind,
        "help": help,
        "limit": limit,
        "metavar": metavar,
        "spelling": spelling,
        "is_for_workers": is_for_workers,
    }
    made: _T = dataclasses.field(default=default, metadata=about)
    return made


# Limits. Comparisons with NaN are false, so each says what is accepted.


def within(low: float, high: float) -> Limit:
    def check(value: float, vocab_size: int) -> Broken | None:
        return None if low <= value <= high else Broken(f"is {value:g}", f"{low:g} to {high:g}")

    return check


def above_zero(value: float, vocab_size: int) -> Broken | None:
    # As float32, which messages carry: the largest and the smallest that are not 0 or infinite.
    if _SMALLEST <= value <= _LARGEST:
        return None
    return Broken(f"is {value:g}", "above 0, and finite")


_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127


def at_least(low: int) -> Limit:
    def check(value: int, vocab_size: int) -> Broken | None:
        return None if value >= low else Broken(f"is {value}", f"at least {low}")

    return check


def up_to_the_vocabulary(value: int, vocab_size: int) -> Broken | None:
    if value <= vocab_size:
        return None
    return Broken(f"is {value}", f"0 to the vocabulary's size, {vocab_size}")


def texts(max_num: int, max_length: int) -> Limit:
    """`max_length` counts characters."""

    def check(value: Sequence[str], vocab_size: int) -> Broken | None:
        if len(value) > max_num:
            return Broken(f"has {len(value)} texts", f"{max_num} texts")
        for index, text in enumerate(value):
            if not 1 <= len(text) <= max_length:
                limit = f"1 to {max_length} characters"
                return Broken(f"has {len(text)} characters", limit, index)
        return None

    return check


def token_ids(max_num: int) -> Limit:
    def check(value: Sequence[int], vocab_size: int) -> Broken | None:
        if len(value) > max_num:
            return Broken(f"has {len(value)} tokens", f"{max_num} tokens")
        return unknown_token(value, vocab_size)

    return check


def biases(max_num: int, most: float) -> Limit:
    """Of a mapping of token ids; an entry is named by its token."""

    def check(value: Mapping[int, float], vocab_size: int) -> Broken | None:
        if len(value) > max_num:
            return Broken(f"has {len(value)} tokens", f"{max_num} tokens")
        for token_id, bias in sorted(value.items()):
            if token_id >= vocab_size:
                limit = f"tokens below the vocabulary's size, {vocab_size}"
                return Broken("is for a token that the model lacks", limit, token_id)
            if not -most <= bias <= most:
                return Broken(f"is {bias:g}", f"{-most:g} to {most:g}", token_id)
        return None

    return check


def unknown_token(value: Sequence[int], vocab_size: int) -> Broken | None:
    if max(value, default=0) < vocab_size:
        return None
    index = next(index for index, token_id in enumerate(value) if token_id >= vocab_size)
    return Broken(f"is {value[index]}", f"below the vocabulary's size, {vocab_size}", index)


# The fields

BANNING_BIAS = -100.0
"""A token with that bias is not drawn at all, whatever the temperature."""
MOST_BIASES = 1024
MOST_ALLOWED = 4096
MOST_BAD_WORDS = 128
MOST_BAD_WORD_LENGTH = 256

ALL_TOKENS = -1
"""How HTTP clients say `max_tokens` when they want as many as there is room for."""

MOST_TOP_LOGPROBS = 20
"""Of the likeliest tokens in a token's place, so many are told of at most."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 are off, and
    so are penalties of 0, or of 1 for repetition.

    `max_tokens` counts every generated token of the request, those of earlier attempts included.
    For requests that leave it or `seed` out, admission makes one up.
    """

    max_tokens: int = declared(
        Kind.COUNT,
        16,
        limit=at_least(1),
        metavar="N",
        help="tokens to generate",
        spelling=Spelling(
            lowest=ALL_TOKENS, read=lambda value: None if value == ALL_TOKENS else value
        ),
    )
    temperature: float = declared(
        Kind.NUMBER, 1.0, limit=within(0, 100), metavar="T", help="0 is greedy"
    )
    top_p: float = declared(
        Kind.NUMBER,
        1.0,
        # 0 keeps the likeliest token.
        limit=within(0, 1),
        metavar="P",
        help="keep the likeliest share P",
    )
    top_k: int = declared(
        Kind.COUNT,
        0,
        limit=up_to_the_vocabulary,
        metavar="K",
        help="keep the K likeliest",
        # -1 is off, too.
        spelling=Spelling(lowest=-1, read=lambda value: max(value, 0)),
    )
    min_p: float = declared(
        Kind.NUMBER,
        0.0,
        limit=within(0, 1),
        metavar="P",
        help="drop what is less than P as likely as the top",
    )
    seed: int = declared(
        Kind.SEED,
        0,
        metavar="S",
        help="same seed, same answer",
        # OpenAI's seeds have a sign; those without it are the same numbers as over gRPC. -1 is no
        # seed, as in llama.cpp and vLLM.
        spelling=Spelling(
            lowest=-(2**63), read=lambda value: None if value == -1 else value % 2**64
        ),
    )
    stops: tuple[str, ...] = declared(
        Kind.TEXTS,
        (),
        limit=texts(max_num=16, max_length=256),
        metavar="TEXT",
        help="end before this text; may be repeated",
        # Forms that were left empty send empty texts.
        spelling=Spelling(
            name="stop",
            read=lambda value: [
                text for text in ([value] if isinstance(value, str) else value) if text
            ],
        ),
        is_for_workers=False,
    )
    stop_token_ids: frozenset[int] = declared(
        Kind.TOKEN_IDS,
        frozenset(),
        limit=token_ids(max_num=64),
        metavar="1,2,3",
        help="end with any of these tokens",
    )
    presence_penalty: float = declared(
        Kind.NUMBER,
        0.0,
        limit=within(-2, 2),
        metavar="P",
        help="taken from the logit of what the answer has already",
    )
    frequency_penalty: float = declared(
        Kind.NUMBER,
        0.0,
        limit=within(-2, 2),
        metavar="P",
        help="taken from a token's logit for each time that the answer has it",
    )
    repetition_penalty: float = declared(
        Kind.NUMBER,
        1.0,
        limit=above_zero,
        metavar="P",
        help="divide the logits of what prompt or answer have already; above 1 repeats less",
    )
    min_tokens: int = declared(
        Kind.COUNT, 0, metavar="N", help="tokens before which the answer does not end"
    )
    logit_bias: tuple[tuple[int, float], ...] = declared(
        Kind.BIASES,
        (),
        limit=biases(MOST_BIASES, -BANNING_BIAS),
        metavar="ID:B,...",
        help="add to the logits of tokens; -100 bans one",
    )
    bad_words: tuple[str, ...] = declared(
        Kind.TEXTS,
        (),
        limit=texts(max_num=MOST_BAD_WORDS, max_length=MOST_BAD_WORD_LENGTH),
        metavar="TEXT",
        help="do not write this text; may be repeated",
        spelling=Spelling(read=lambda value: [value] if isinstance(value, str) else value),
        # Workers get what the tokenizer makes of them, with the sequence.
        is_for_workers=False,
    )
    allowed_token_ids: frozenset[int] = declared(
        Kind.TOKEN_IDS,
        frozenset(),
        limit=token_ids(max_num=MOST_ALLOWED),
        metavar="1,2,3",
        help="draw from these tokens only",
        spelling=Spelling(fewest=1),
    )
    include_stop: bool = declared(
        Kind.SWITCH,
        False,
        help="show what ended the answer, a stop text or token, as its last text",
        spelling=Spelling(name="include_stop_str_in_output"),
        is_for_workers=False,
    )
    skip_special_tokens: bool = declared(
        Kind.SWITCH, True, help="leave special tokens out of the text", is_for_workers=False
    )
    ignore_eos: bool = declared(Kind.SWITCH, False, help="go on past end-of-sequence tokens")
    speculate: bool = declared(
        Kind.SWITCH,
        True,
        help="guess tokens and verify them, where workers do; the answer is the same",
    )
    logprobs: int | None = declared(
        Kind.MAYBE_COUNT,
        None,
        limit=within(0, MOST_TOP_LOGPROBS),
        metavar="N",
        help="tell of each token how likely it was, and of the N likeliest",
    )
    prompt_logprobs: int | None = declared(
        Kind.MAYBE_COUNT,
        None,
        limit=within(0, MOST_TOP_LOGPROBS),
        metavar="N",
        help="the same of the prompt's tokens",
    )


FIELDS = tuple(
    SamplingField(name=field.name, default=field.default, **field.metadata)
    for field in dataclasses.fields(SamplingParams)
)
"""All of them, in the order of the declarations."""
