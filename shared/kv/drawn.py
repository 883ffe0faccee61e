"""Drawn: what came of drawing at one position, one type from the device to the gateway."""

from __future__ import annotations

from typing import NamedTuple


class Drawn(NamedTuple):
    """A token, or why there is none."""

    token_id: int
    """Says nothing where there is a failure."""
    failure: str | None = None


NOTHING_LEFT = -2
"""How samplers say that every token is ruled out."""
BAD_LOGITS = Drawn(-1, "the logits were not numbers")
NO_TOKEN = Drawn(NOTHING_LEFT, "no token is left to draw")


def drawn_of(token_id: int) -> Drawn:
    """`token_id`: as samplers give it, below zero where the logits were not numbers."""
    if token_id >= 0:
        return Drawn(token_id)
    return NO_TOKEN if token_id == NOTHING_LEFT else BAD_LOGITS
