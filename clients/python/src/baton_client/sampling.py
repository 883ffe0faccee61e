"""Generated from protos/baton/v1/types.proto by `make client-stubs`: how tokens are drawn."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Tokens to generate at most, those already received included; at least 1. Default: as many as
    fit into the model's length, at most 256."""
    stops: Sequence[str]
    """The answer ends before the first of these texts. Applied by the gateway."""
    stop_token_ids: Sequence[int]
    """The answer ends with the first of these tokens."""
    ignore_eos: bool | None
    """Go on past the model's end-of-sequence tokens."""
    speculate: bool | None
    """Whether workers that guess tokens and verify them (`--speculate`) do so here; the answer is
    the same. Default true."""
