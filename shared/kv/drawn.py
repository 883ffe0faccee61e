"""Drawn: what came of drawing at one position, one type from the device to the gateway."""

from __future__ import annotations

from typing import NamedTuple


class Drawn(NamedTuple):
    """A token, or why there is none."""

    token_id: int
    """Says nothing where there is a failure."""
    failure: str | None = None


BAD_LOGITS = Drawn(-1, "the logits were not numbers")


def drawn_of(token_id: int) -> Drawn:
    """`token_id`: as samplers give it, below zero where the logits were not numbers."""
    return Drawn(token_id) if token_id >= 0 else BAD_LOGITS
