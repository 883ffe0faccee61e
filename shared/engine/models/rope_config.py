"""Rotary embedding of a layer: which pairs of a head turn, and what their speeds follow from.

rope_fields.py reads it, rope.py computes it. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of a layer. What a type does not name in rope.py has no meaning for it."""

    theta: float
    rope_type: str
    """default, linear, llama3, yarn, longrope, proportional; or none: nothing turns."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    """Tokens of the longest sequence before the context was extended."""
    partial_rotary_factor: float = 1.0
    """Share of a head that turns: its first numbers, or of `proportional` its fastest pairs."""
    is_interleaved: bool = False
    """The checkpoint's pairs are neighbours, not the same place in two halves."""
    attention_factor: float = 1.0
    """What cosines and sines are multiplied by."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    is_truncated: bool = True
    """Yarn's ramp is between whole pairs."""
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    score_factor: float = 1.0
    """What products of queries and keys are multiplied by beside their scale."""
    query_scale_beta: float = 0.0
    """How queries grow with the logarithm of their position; 0: they do not."""

    def is_long(self, max_model_len: int) -> bool:
        """Whether longrope takes its long factors, once for all sequences of a worker.

        transformers decides anew for every batch, by its longest sequence. Here keys are kept and
        handed on, so those of one sequence must not depend on the others, nor on its own length;
        nor on free memory: with auto, `max_model_len` is the model's own.
        """
        return max_model_len > self.original_max_position


NO_ROPE = RopeConfig(theta=1.0, rope_type="none")


def num_turning_pairs(rope: RopeConfig, head_dim: int) -> int:
    """Pairs of a head that turn; they are its first ones here."""
    if rope.rope_type == "none":
        return 0
    if rope.rope_type == "proportional":
        return int(rope.partial_rotary_factor * head_dim // 2)
    return (int(head_dim * rope.partial_rotary_factor) + 1) // 2


def rope_order(rope: RopeConfig, head_dim: int) -> tuple[int, ...] | None:
    """Which of a checkpoint's numbers of a head stands at each place here, where pair i is
    (i, i + head_dim / 2) and those that turn come first; None: they stand there already.

    With queries and keys in the same order, their products are what they were.
    """
    if rope.rope_type == "none":
        return None
    turning = head_dim
    if rope.rope_type != "proportional":
        turning = 2 * num_turning_pairs(rope, head_dim)
    first = [*range(0, turning, 2)] if rope.is_interleaved else [*range(turning // 2)]
    step = 1 if rope.is_interleaved else turning // 2
    second = [place + step for place in first]
    half = (head_dim - turning) // 2
    first += range(turning, turning + half)
    second += range(turning + half, head_dim)
    order = (*first, *second)
    return None if order == tuple(range(head_dim)) else order


def describe_choices(ropes: Iterable[RopeConfig], max_model_len: int) -> str:
    """What of the ropes depends on the worker; workers that differ here have different keys."""
    chosen = [
        f"longrope {'long' if rope.is_long(max_model_len) else 'short'}"
        for rope in dict.fromkeys(ropes)
        if rope.rope_type == "longrope"
    ]
    return ", ".join(chosen)


def check_fit(rope: RopeConfig, head_dim: int) -> None:
    """Raises ValueError: the rope is not one for heads of that size."""
    num_pairs = num_turning_pairs(rope, head_dim)
    num_turning = int(head_dim * rope.partial_rotary_factor)
    if rope.rope_type == "yarn" and num_turning % 2:
        raise ValueError(f"yarn turns an even share of a head, not {num_turning} of {head_dim}")
    if rope.rope_type != "longrope":
        return
    for name, factors in (("short_factor", rope.short_factor), ("long_factor", rope.long_factor)):
        if len(factors) != num_pairs:
            raise ValueError(
                f"{name} has {len(factors)} entries, and heads of {head_dim} turn {num_pairs} pairs"
            )
