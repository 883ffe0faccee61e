"""Mamba2's recurrence (state space duality, arXiv 2405.21060) in plain torch.

Every head keeps a matrix [head_dim, state_size], its state. With a token it decays, takes in what
the token adds, and is read:

    step    = clamp(softplus(dt_scale · dt + dt_bias))      how far the token moves the state
    state   = exp(step · a) · state + (step · x) ⊗ b        x [head_dim], b [state_size]
    y       = state · c + d · x                             c [state_size]

b and c are common to the heads of a group. `ssd` does it token by token, of sums, products and the
exp and log1p that are measured: bits of float32 do not depend on what else is in a step, nor on
where its rows are cut. `ssd_in_chunks` is the same as products of matrices, faster for long rows
and rounded differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.kernels.state_plan import TILE_TOKENS, StandingPlan, StatePlan, StateRow

CHUNK = TILE_TOKENS
"""Tokens of a product of the chunked form."""
_SCRATCH_NUMBERS = 2**21
"""About how many states' numbers a stretch of tokens may take at once."""
_LINEAR_FROM = 20.0
"""Softplus is the identity from here on, as in torch."""


@dataclass(frozen=True, slots=True)
class SsdWeights:
    """Of H heads; all float32 [H]."""

    a: Tensor
    """Below zero."""
    d: Tensor
    dt_bias: Tensor
    num_groups: int
    """Runs of heads, equally many in each, that have b and c in common."""
    dt_scale: float = 1.0
    dt_min: float = 0.0
    dt_max: float = float("inf")


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) of float32, of operations that are measured to be stable → a new tensor."""
    return torch.where(x > _LINEAR_FROM, x, x.clamp(max=_LINEAR_FROM).exp_().log1p_())


def ssd(
    x: Tensor,
    dt: Tensor,
    weights: SsdWeights,
    state: Tensor,
    layer: int,
    plan: StatePlan | StandingPlan,
) -> Tensor:
    """The recurrence, token by token.

    Args:
        x: [≥ T, H · head_dim + 2 · groups · state_size]: x, b and c of each token, side by side.
        dt: [≥ T, H]; rows may be strided.
        state: [num_slots + 1, H, layers, head_dim, state_size], any float dtype.
        layer: which of these layers.

    Returns:
        y [≥ T, H, head_dim], in x's dtype; zeros in tokens of no row.
    """
    _note(x, dt, weights, state, layer, plan)
    states = state[:, :, layer]
    inputs = _Inputs(x, dt, weights, states)
    y = torch.zeros_like(inputs.x)
    at_once = max(1, _SCRATCH_NUMBERS // states[0].numel())
    together = []
    for row in plan.rows():
        if row.is_single:
            together.append(row)
            continue
        own = _begin(states, row, inputs.wide)
        for these in _stretches(row, at_once):
            y[these] = inputs.read(inputs.through(own, these), these)
            _store(states, row, these.stop, own)
    for first in range(0, len(together), at_once):
        those = together[first : first + at_once]
        tokens = torch.tensor([row.tokens.start for row in those], device=x.device)
        slots = torch.tensor([row.slot for row in those], device=x.device)
        own = states[slots].to(inputs.wide)
        own[[row.is_first for row in those]] = 0
        own.mul_(inputs.decay[tokens, :, None, None]).add_(inputs.added(tokens))
        states[slots] = own.to(states.dtype)
        y[tokens] = inputs.read(own, tokens)
    return y.to(x.dtype)


def ssd_in_chunks(
    x: Tensor, dt: Tensor, weights: SsdWeights, state: Tensor, layer: int, plan: StatePlan
) -> Tensor:
    """As `ssd`, up to CHUNK tokens of a row at once."""
    _note(x, dt, weights, state, layer, plan)
    states = state[:, :, layer]
    inputs = _Inputs(x, dt, weights, states)
    y = torch.zeros_like(inputs.x)
    for row in plan.rows():
        own = _begin(states, row, inputs.wide)
        for these in _stretches(row, CHUNK):
            y[these], own = inputs.chunk(own, these)
            _store(states, row, these.stop, own)
    return y.to(x.dtype)


def _note(
    x: Tensor,
    dt: Tensor,
    weights: SsdWeights,
    state: Tensor,
    layer: int,
    plan: StatePlan | StandingPlan,
) -> None:
    """Guesses that stand are gone through token by token, as others are that decode."""

    def again(x: Tensor, dt: Tensor, plan: StandingPlan) -> Tensor:
        return ssd(x, dt, weights, state, layer, plan)

    plan.note(again, x, dt)


def _begin(states: Tensor, row: StateRow, dtype: torch.dtype) -> Tensor:
    """What a row begins with, a copy."""
    if row.is_first:
        return torch.zeros(states.shape[1:], dtype=dtype, device=states.device)
    return states[row.slot].to(dtype, copy=True)


def _stretches(row: StateRow, most: int) -> Iterator[slice]:
    """A row's tokens, at most so many at once, cut where a state is stored."""
    first, end = row.tokens.start, row.tokens.stop
    for stop in sorted({first + count for count, _ in row.stores} | {end}):
        for start in range(first, stop, most):
            yield slice(start, min(start + most, stop))
        first = stop


def _store(states: Tensor, row: StateRow, stop: int, own: Tensor) -> None:
    """`stop`: behind the last token that the state has seen."""
    for count, slot in row.stores:
        if row.tokens.start + count == stop:
            states[slot] = own.to(states.dtype)


class _Inputs:
    """What tokens bring, float32."""

    def __init__(self, x: Tensor, dt: Tensor, weights: SsdWeights, states: Tensor) -> None:
        _, num_heads, head_dim, state_size = states.shape
        groups, inner = weights.num_groups, num_heads * head_dim
        self.wide = wide = torch.promote_types(states.dtype, torch.float32)
        parts = x.to(wide).split([inner, groups * state_size, groups * state_size], -1)
        self.x = parts[0].unflatten(-1, (num_heads, head_dim))
        step = softplus(dt.to(wide) * weights.dt_scale + weights.dt_bias)
        step = step.clamp_(weights.dt_min, weights.dt_max)
        self.exponent = step * weights.a
        self.decay = self.exponent.exp()
        self.stepped = self.x * step[..., None]
        self._b, self._c = (part.unflatten(-1, (groups, state_size)) for part in parts[1:])
        self._heads_each = num_heads // groups
        self._skipped = self.x * weights.d[:, None]
        self._dtype = states.dtype

    def added(self, tokens: slice | Tensor) -> Tensor:
        """[n, H, head_dim, state_size]: what they add to the state."""
        stepped: Tensor = self.stepped[tokens, :, :, None]
        return stepped * self._of_heads(self._b, tokens)[:, :, None]

    def through(self, state: Tensor, tokens: slice) -> Tensor:
        """Takes the state through these tokens, in place → [n, H, head_dim, state_size], what it is
        behind each."""
        behind = self.added(tokens)
        for own, decay in zip(behind, self.decay[tokens, :, None, None], strict=True):
            own.add_(state.mul_(decay))
            # A slot of fewer bits rounds behind every token, wherever a row ends.
            state.copy_(own if self._dtype == state.dtype else own.to(self._dtype))
        return behind

    def read(self, states: Tensor, tokens: slice | Tensor) -> Tensor:
        """y of these tokens, of the states behind them, which are not needed any more."""
        total = states.mul_(self._of_heads(self._c, tokens)[:, :, None])
        size = total.shape[-1]
        while size > 1:
            # One half is added to the other: sums of torch are in another order for other shapes.
            half = -(-size // 2)
            total[..., : size - half].add_(total[..., half:size])
            size = half
        y: Tensor = total[..., 0] + self._skipped[tokens]
        return y

    def chunk(self, state: Tensor, tokens: slice) -> tuple[Tensor, Tensor]:
        """y of these tokens, and the state behind them."""
        upto = self.exponent[tokens].cumsum(0).t()
        b, c = (self._of_heads(each, tokens).transpose(0, 1) for each in (self._b, self._c))
        stepped = self.stepped[tokens].transpose(0, 1)
        between = (upto[:, :, None] - upto[:, None]).tril_().exp_().tril_()
        y = torch.bmm(torch.bmm(c, b.mT).mul_(between), stepped)
        y += torch.bmm(c, state.mT).mul_(upto.exp()[..., None])
        left = (upto[:, -1:] - upto).exp_()
        state = state * upto[:, -1, None, None].exp() + torch.bmm((stepped * left[..., None]).mT, b)
        return y.transpose(0, 1) + self._skipped[tokens], state

    def _of_heads(self, part: Tensor, tokens: slice | Tensor) -> Tensor:
        """[T, groups, state_size] → these tokens', [n, H, state_size]."""
        of_heads: Tensor = part[tokens].repeat_interleave(self._heads_each, 1)
        return of_heads
