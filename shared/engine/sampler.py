"""Which token follows: a pure function of (logits, parameters, seed, sample index, position).

Every draw has its own key, a hash of seed, sample index and position of the token to be drawn; the
random number of a token id is a hash of that key and the id. Nothing is carried from draw to draw,
so another batch, worker or attempt draws the same token from the same logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baton.kernels import reference_sampling
from baton.shared.kv.drawn import NOTHING_LEFT
from baton.shared.sampling import SamplingParams

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_INF = float("inf")


def sample_tokens(
    logits: Tensor,
    params: Sequence[SamplingParams],
    sample_indices: Sequence[int],
    positions: Sequence[int],
) -> list[int]:
    """Draws one token per row; −1 where the logits hold a NaN or +inf, NOTHING_LEFT where all are
    −inf.

    Args:
        logits: float32 [R, vocab].
        params: [R].
        sample_indices: [R], which of a request's samples each row is.
        positions: [R], position that the drawn token will have.
    """
    random = [i for i, each in enumerate(params) if each.temperature > 0]
    highest, tokens = logits.max(-1)
    if random:
        drawn = _draw(logits, params, sample_indices, positions, random)
        if len(random) < len(params):
            tokens[random] = drawn
        else:
            tokens = drawn
    return [
        token_id if -_INF < most < _INF else NOTHING_LEFT if most == -_INF else -1
        for token_id, most in zip(tokens.tolist(), highest.tolist(), strict=True)
    ]


def draw_stream(seed: int, sample_index: int, shift: int = 0) -> int:
    """The random stream of one sample: 64 bits, as a signed number. `shift`: its keys are those of
    positions so many further on."""
    state = _mix((seed + _GOLDEN) & _MASK)
    stream = _mix((state + (sample_index + 1) * _GOLDEN) & _MASK)
    return _signed((stream + shift * _GOLDEN) & _MASK)


def draw_key(seed: int, sample_index: int, position: int) -> int:
    """The 64 random bits of one draw, as a signed number."""
    stream = draw_stream(seed, sample_index)
    return _signed(_mix((stream + (position + 1) * _GOLDEN) & _MASK))


def _draw(
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

    return reference_sampling.sample(
        logits if len(rows) == len(params) else logits[list(rows)],
        column([each.temperature for each in chosen], torch.float32),
        column([each.top_k for each in chosen], torch.int64),
        column([each.top_p for each in chosen], torch.float32),
        column([each.min_p for each in chosen], torch.float32),
        column(keys, torch.int64),
    )


def _signed(state: int) -> int:
    return state - 2**64 if state >> 63 else state


def _mix(state: int) -> int:
    """The finaliser of SplitMix64."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
