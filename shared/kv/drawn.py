"""Drawn: what came of drawing at one position, one type from the device to the gateway."""

from __future__ import annotations

from typing import NamedTuple


class TokenLogprobs(NamedTuple):
    """How likely the model held a token, and which it held for the likeliest in its place.

    Logprobs are natural logarithms of probabilities, of the model's own logits.
    """

    logprob: float
    rank: int
    """1 for the likeliest."""
    top_token_ids: tuple[int, ...]
    """The likeliest first, as many as were asked for."""
    top_logprobs: tuple[float, ...]


class Drawn(NamedTuple):
    """A token, or why there is none."""

    token_id: int
    """Says nothing where there is a failure."""
    failure: str | None = None
    logprobs: TokenLogprobs | None = None
    """If they are wanted."""


NOTHING_LEFT = -2
"""How samplers say that every token is ruled out."""
BAD_LOGITS = Drawn(-1, "the logits were not numbers")
NO_TOKEN = Drawn(NOTHING_LEFT, "no token is left to draw")


def drawn_of(token_id: int) -> Drawn:
    """`token_id`: as samplers give it, below zero where the logits were not numbers."""
    if token_id >= 0:
        return Drawn(token_id)
    return NO_TOKEN if token_id == NOTHING_LEFT else BAD_LOGITS


def with_logprobs(drawn: Drawn, logprobs: TokenLogprobs | None) -> Drawn:
    """`logprobs`: those that are wanted of it; None where the logits were not numbers."""
    if drawn.failure is not None:
        return drawn
    return BAD_LOGITS if logprobs is None else drawn._replace(logprobs=logprobs)
