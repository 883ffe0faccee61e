"""The gated delta rule in plain torch: a recurrence whose state maps keys to values.

Of each value head, with the state S [key_dim, value_dim] of the token before, unit vectors q and k,
a value v, a decay and a strength from 0 to 1 (Gated Delta Networks, arXiv 2412.06464):

    S ← decay · S;  S ← S + k ⊗ strength · (v − kᵀS);  out = qᵀS / √key_dim

Value heads share key heads: `num_value_heads / num_key_heads` neighbours have one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from baton.kernels.reference import activate
from baton.kernels.state_plan import StandingPlan, StatePlan

UNIT_EPS = 1e-6
"""Added to the sum of squares of queries and keys."""
_SCRATCH_NUMBERS = 2**21
"""About how many numbers of states rows of one token may take at once."""


class DeltaGates(NamedTuple):
    """How fast heads forget: decay = exp(−rate · softplus(input + bias))."""

    rate: Tensor
    """float32 [num_value_heads]"""
    bias: Tensor
    """float32 [num_value_heads]"""


def gated_delta(
    qkv: Tensor,
    strength: Tensor,
    decay: Tensor,
    gates: DeltaGates,
    state: Tensor,
    layer: int,
    plan: StatePlan | StandingPlan,
) -> Tensor:
    """The rule over every row's tokens, one after another, each as if it were alone: bits depend on
    nothing else in the step. Rows of one token are computed together.

    Args:
        qkv: [≥ T, C], the queries of all key heads, then their keys, then the values of all value
            heads; rows may be strided.
        strength, decay: [≥ T, num_value_heads], before sigmoid and `gates`; rows may be strided.
        state: float32 [num_slots + 1, num_key_heads, layers, value heads of each, key_dim,
            value_dim].
        layer: which of these layers.

    Returns:
        [≥ T, num_value_heads, value_dim] of qkv's dtype; zeros in tokens of no row.
    """
    _, num_key_heads, _, num_each, key_dim, value_dim = state.shape

    def again(qkv: Tensor, strength: Tensor, decay: Tensor, plan: StandingPlan) -> Tensor:
        return gated_delta(qkv, strength, decay, gates, state, layer, plan)

    plan.note(again, qkv, strength, decay)
    num_heads = num_key_heads * num_each
    inputs = _Inputs(qkv, strength, decay, gates, state)
    out = torch.zeros(len(qkv), num_heads, value_dim, device=qkv.device)
    own = state[:, :, layer]
    together = []
    for row in plan.rows():
        if row.is_single:
            together.append(row)
            continue
        if row.is_first:
            s = out.new_zeros(num_heads, key_dim, value_dim)
        else:
            s = own[row.slot].reshape(num_heads, key_dim, value_dim).clone()
        to_slots: dict[int, list[int]] = {}
        for num_tokens, to in row.stores:
            to_slots.setdefault(num_tokens, []).append(to)
        for number, token in enumerate(range(row.tokens.start, row.tokens.stop), 1):
            out[token] = inputs.through(s, token)
            for to in to_slots.get(number, ()):
                own[to] = s.view(own.shape[1:])
    at_once = max(1, _SCRATCH_NUMBERS // own[0].numel())
    for first in range(0, len(together), at_once):
        those = together[first : first + at_once]
        tokens = torch.tensor([row.tokens.start for row in those], device=qkv.device)
        slots = torch.tensor([row.slot for row in those], device=qkv.device)
        s = own[slots].view(len(those), num_heads, key_dim, value_dim)
        s[[row.is_first for row in those]] = 0
        out[tokens] = inputs.through(s, tokens)
        own[slots] = s.view(len(those), *own.shape[1:])
    return out.to(qkv.dtype)


class _Inputs:
    """What tokens bring, float32."""

    def __init__(
        self, qkv: Tensor, strength: Tensor, decay: Tensor, gates: DeltaGates, state: Tensor
    ) -> None:
        _, _, _, num_each, key_dim, _ = state.shape
        query, key, self._value = _split(qkv.float(), state)
        self._query = _each(_unit(query).mul_(key_dim**-0.5), num_each)
        self._key = _each(_unit(key), num_each)
        self._strength = activate(strength.float(), "sigmoid")
        self._decay = decays_of(decay, gates)

    def through(self, s: Tensor, tokens: int | Tensor) -> Tensor:
        """Takes a state [num_value_heads, key_dim, value_dim] through a token, or several states
        through one each, in place → what comes out, without key_dim. That sums over keys do not
        depend on how many there are is measured at start (determinism.py)."""
        k = self._key[tokens][..., None]
        s.mul_(self._decay[tokens][..., None, None])
        known = (s * k).sum(-2)
        change = (self._value[tokens] - known).mul_(self._strength[tokens][..., None])
        s.add_(k * change[..., None, :])
        out: Tensor = (s * self._query[tokens][..., None]).sum(-2)
        return out


def decays_of(inputs: Tensor, gates: DeltaGates) -> Tensor:
    """float32 [T, num_value_heads], of inputs of that shape."""
    x = inputs.float() + gates.bias
    # softplus(x) = max(x, 0) + log1p(exp(−|x|)); both functions are measured to be stable.
    softplus = x.abs().neg_().exp_().log1p_().add_(x.clamp(min=0))
    return softplus.mul_(gates.rate).neg_().exp_()


def _split(qkv: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """→ queries and keys [T, num_key_heads, key_dim], values [T, num_value_heads, value_dim]."""
    _, num_key_heads, _, num_each, key_dim, value_dim = state.shape
    key_size = num_key_heads * key_dim
    query, key, value = qkv.split((key_size, key_size, num_key_heads * num_each * value_dim), -1)
    return (
        query.unflatten(-1, (num_key_heads, key_dim)),
        key.unflatten(-1, (num_key_heads, key_dim)),
        value.unflatten(-1, (num_key_heads * num_each, value_dim)),
    )


def _each(x: Tensor, num_each: int) -> Tensor:
    """[T, num_key_heads, key_dim] → [T, num_value_heads, key_dim]"""
    return x if num_each == 1 else x.repeat_interleave(num_each, 1)


def _unit(x: Tensor) -> Tensor:
    return x * x.square().sum(-1, keepdim=True).add_(UNIT_EPS).rsqrt_()
