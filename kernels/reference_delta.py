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
from baton.kernels.state_plan import StatePlan

UNIT_EPS = 1e-6
"""Added to the sum of squares of queries and keys."""


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
    plan: StatePlan,
) -> Tensor:
    """The rule over every row's tokens, one after another, each as if it were alone: bits depend on
    nothing else in the step.

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
    num_heads = num_key_heads * num_each
    query, key, value = _split(qkv.float(), state)
    query = _each(_unit(query).mul_(key_dim**-0.5), num_each)
    key = _each(_unit(key), num_each)
    strengths, decays = activate(strength.float(), "sigmoid"), decays_of(decay, gates)
    out = torch.zeros(len(qkv), num_heads, value_dim, device=qkv.device)
    own = state[:, :, layer]
    for tokens, slot, is_first, stores in plan.rows():
        if is_first:
            s = out.new_zeros(num_heads, key_dim, value_dim)
        else:
            s = own[slot].reshape(num_heads, key_dim, value_dim).clone()
        to_slots: dict[int, list[int]] = {}
        for num_tokens, to in stores:
            to_slots.setdefault(num_tokens, []).append(to)
        for number, token in enumerate(range(tokens.start, tokens.stop), 1):
            s.mul_(decays[token, :, None, None])
            k = key[token, :, :, None]
            known = (s * k).sum(1)
            change = (value[token] - known).mul_(strengths[token, :, None])
            s.add_(k * change[:, None])
            out[token] = (s * query[token, :, :, None]).sum(1)
            for to in to_slots.get(number, ()):
                own[to] = s.view(own.shape[1:])
    return out.to(qkv.dtype)


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
