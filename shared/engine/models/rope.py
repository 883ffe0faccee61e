"""Rotary embedding: how fast each pair of a head turns, and the tables of its angles.

The arithmetic is that of transformers, in float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from baton.shared.engine.models.rope_config import RopeConfig, num_turning_pairs


class RopeTables(NamedTuple):
    """By position, float32."""

    cos: Tensor
    """[positions, head_dim / 2]: of the angle of each pair; pairs that do not turn have 1."""
    sin: Tensor
    """[positions, head_dim / 2]; pairs that do not turn have 0."""
    query_scale: Tensor | None
    """[positions]: what queries are multiplied by; None: nothing."""


def rope_tables(rope: RopeConfig, head_dim: int, num_positions: int, made_for: int) -> RopeTables:
    """Of positions below `num_positions`.

    made_for: tokens of the longest sequence that the choice of longrope is made for.
    """
    positions = torch.arange(num_positions, dtype=torch.float32)
    frequencies = _inverse_frequencies(rope, head_dim, made_for)
    angles = positions[:, None] * frequencies
    num_still = head_dim // 2 - len(frequencies)
    return RopeTables(
        _with_still(angles.cos().mul_(rope.attention_factor), num_still, 1.0),
        _with_still(angles.sin().mul_(rope.attention_factor), num_still, 0.0),
        _query_scale(rope, positions),
    )


def _with_still(table: Tensor, num_still: int, value: float) -> Tensor:
    # Tables of long contexts are large: no copy for nothing.
    return torch.nn.functional.pad(table, (0, num_still), value=value) if num_still else table


def _inverse_frequencies(rope: RopeConfig, head_dim: int, made_for: int) -> Tensor:
    """Radians per position of each pair that turns: float32 [pairs]."""
    if rope.rope_type == "none":
        return torch.zeros(0)
    size = head_dim
    if rope.rope_type != "proportional":
        size = int(head_dim * rope.partial_rotary_factor)
    places = torch.arange(num_turning_pairs(rope, head_dim), dtype=torch.float32) * 2
    slowness = rope.theta ** (places / size)
    plain = 1.0 / slowness
    match rope.rope_type:
        case "linear" | "proportional":
            return plain / rope.factor
        case "llama3":
            return _llama3(rope, plain)
        case "yarn":
            return _yarn(rope, slowness, size)
        case "longrope":
            is_long = rope.is_long(made_for)
            return 1.0 / (
                torch.tensor(rope.long_factor if is_long else rope.short_factor) * slowness
            )
    return plain


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, with a ramp between."""
    turns = rope.original_max_position * plain / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn(rope: RopeConfig, slowness: Tensor, size: int) -> Tensor:
    """Likewise; the ramp is over pairs, between those that turn `beta_fast` and `beta_slow` times
    within the original length."""
    fast, slow = _yarn_pair(rope, rope.beta_fast, size), _yarn_pair(rope, rope.beta_slow, size)
    if rope.is_truncated:
        fast, slow = math.floor(fast), math.ceil(slow)
    first, last = max(fast, 0), min(slow, size - 1)
    if first == last:
        last += 0.001
    places = torch.arange(len(slowness), dtype=torch.float32)
    kept = 1 - ((places - first) / (last - first)).clamp(0, 1)
    return 1.0 / (rope.factor * slowness) * (1 - kept) + 1.0 / slowness * kept


def _yarn_pair(rope: RopeConfig, num_turns: float, size: int) -> float:
    """Which pair, between whole ones, turns so often within the original length."""
    wavelength = rope.original_max_position / num_turns
    return size * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))


def _query_scale(rope: RopeConfig, positions: Tensor) -> Tensor | None:
    if not rope.query_scale_beta:
        return None
    times = (positions / rope.original_max_position).floor()
    return 1 + rope.query_scale_beta * (1 + times).log()
