"""Generated from protos/baton/v1/types.proto by `make client-stubs`: how tokens are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict


class Sampling(TypedDict, total=False):
    """What is left out, or None, takes the server's default."""

    temperature: float | None
    """0 is greedy; 0 to 100. Default 1."""
    top_p: float | None
    """Above 0, at most 1. Default 1 (off)."""
    top_k: int | None
    """Keep the k likeliest tokens; 0 is off. Default 0."""
    min_p: float | None
    """Keep tokens at least this share as likely as the likeliest; 0 to 1. Default 0 (off)."""
    seed: int | None
    """Drawn by the gateway when it is not set, and told in the first message of the answer."""
    max_tokens: int | None
    """Tokens to generate at most, those already received included; at least 1, or, where
    prompt_logprobs are all that is wanted, 0. Default: as many as fit into the model's length, at
    most 256."""
    stops: Sequence[str]
    """The answer ends before the first of these texts. Applied by the gateway."""
    stop_token_ids: Sequence[int]
    """The answer ends with the first of these tokens."""
    ignore_eos: bool | None
    """Go on past the model's end-of-sequence tokens."""
    speculate: bool | None
    """Whether workers that guess tokens and verify them (`--speculate`) do so here; the answer is
    the same. Default true."""
    presence_penalty: float | None
    """Taken from the logit of every token that the answer has already, once; -2 to 2. Default 0."""
    frequency_penalty: float | None
    """Taken from the logit of every token, times how often the answer has it already; -2 to 2.
    Default 0."""
    repetition_penalty: float | None
    """The logits of tokens that prompt or answer have already are divided by it, or multiplied
    where they are below 0; above 0. Default 1 (off)."""
    min_tokens: int | None
    """Before so many tokens no end-of-sequence or stop token is drawn, and no stop text is looked
    for; at most max_tokens. Default 0."""
    logit_bias: Mapping[int, float]
    """By token, what is added to its logit: -100 to 100, where -100 bans it. At most 1024
    tokens."""
    bad_words: Sequence[str]
    """Texts that the answer shall not have, with or without a space before them: the last token of
    what the tokenizer makes of one is not drawn behind the others. Encoded by the gateway."""
    allowed_token_ids: Sequence[int]
    """No other tokens are drawn; none: all may be."""
    logprobs: int | None
    """Tell of every generated token how likely it was, and of this many likeliest tokens in its
    place; 0 to 20. Default: tell nothing."""
    prompt_logprobs: int | None
    """The same of the prompt's tokens, from the second on; 0 to 20. None of those whose logprobs
    are told is found in a cache. Default: tell nothing."""
    include_stop: bool | None
    """Show what ended the answer, one of the stops or the last token, at the end of its text."""
    skip_special_tokens: bool | None
    """Leave special tokens out of the text. The one that ends the answer is shown with include_stop
    only. Default true."""
