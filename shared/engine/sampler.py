"""Which token follows: a pure function of (logits, parameters, seed, sample index, position).

Every draw has its own key, a hash of seed, sample index and position of the token to be drawn; the
random number of a token id is a hash of that key and the id. Nothing is carried from draw to draw,
so another batch, worker or attempt draws the same token from the same logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.engine.operations import Operations
from shared.kv.sequence import SamplingParams

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def sample_tokens(
    ops: Operations,
    logits: Tensor,
    params: Sequence[SamplingParams],
    sample_indices: Sequence[int],
    positions: Sequence[int],
) -> list[int]:
    """Draws one token per row.

    Args:
        logits: float32 [R, vocab].
        params: [R].
        sample_indices: [R], which of a request's samples each row is.
        positions: [R], position that the drawn token will have.
    """
    random = [i for i, each in enumerate(params) if each.temperature > 0]
    if not random:
        return [int(token) for token in logits.argmax(-1).tolist()]
    tokens = logits.argmax(-1) if len(random) < len(params) else None
    drawn = _draw(ops, logits, params, sample_indices, positions, random)
    if tokens is None:
        return [int(token) for token in drawn.tolist()]
    tokens[random] = drawn
    return [int(token) for token in tokens.tolist()]


def draw_key(seed: int, sample_index: int, position: int) -> int:
    """The 64 random bits of one draw, as a signed number."""
    state = _mix((seed + _GOLDEN) & _MASK)
    for field in (sample_index, position):
        state = _mix((state + (field + 1) * _GOLDEN) & _MASK)
    return state - 2**64 if state >> 63 else state


def _draw(
    ops: Operations,
    logits: Tensor,
    params: Sequence[SamplingParams],
    sample_indices: Sequence[int],
    positions: Sequence[int],
    rows: Sequence[int],
) -> Tensor:
    chosen = [params[i] for i in rows]
    keys = [draw_key(params[i].seed, sample_indices[i], positions[i]) for i in rows]
    device = logits.device

    def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    return ops.sample(
        logits if len(rows) == len(params) else logits[list(rows)],
        column([each.temperature for each in chosen], torch.float32),
        column([each.top_k for each in chosen], torch.int64),
        column([each.top_p for each in chosen], torch.float32),
        column([each.min_p for each in chosen], torch.float32),
        column(keys, torch.int64),
    )


def _mix(state: int) -> int:
    """The finaliser of SplitMix64."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
