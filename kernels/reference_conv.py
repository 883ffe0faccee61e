"""Causal convolution over the tokens of a sequence, channel by channel, in plain torch.

It is the short convolution before a recurrence (Gated DeltaNet, Mamba2): each channel of a token is
a weighted sum of that channel in the token and the few tokens before it. Its state is these few
tokens' inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from baton.kernels.reference import Activation, activate
from baton.kernels.state_plan import StandingPlan, StatePlan


class Conv(NamedTuple):
    """C channels, sums over K tokens."""

    weight: Tensor
    """float32 [K, C], contiguous; the last row is for the token itself."""
    bias: Tensor | None
    """float32 [C]"""
    places: Tensor
    """int32 [C]: where a state has a channel, head · width + place in the head."""
    activation: Activation | None = "silu"
    """Of the sums."""


def conv_places(num_heads: int, units: Sequence[int]) -> Tensor:
    """int32 [C], for `Conv`. Channels come in sections, of each of which every head has so many one
    after another, as `units` says; a head of the state has its share of each section."""
    width = sum(units)
    heads = torch.arange(num_heads, dtype=torch.int32)[:, None] * width
    first, sections = 0, []
    for unit in units:
        sections.append((heads + torch.arange(first, first + unit, dtype=torch.int32)).flatten())
        first += unit
    return torch.cat(sections)


def causal_conv(
    x: Tensor, conv: Conv, state: Tensor, layer: int, plan: StatePlan | StandingPlan
) -> Tensor:
    """The convolution of every row's tokens, each element by itself in float32, the oldest token
    first: bits do not depend on the step.

    Args:
        x: [≥ T, C]; rows may be strided.
        state: [num_slots + 1, heads, layers, K − 1, width], any float dtype: the inputs of the
            tokens before, the oldest first.
        layer: which of these layers.

    Returns:
        A new tensor of x's shape and dtype; zeros in tokens of no row.
    """

    def again(x: Tensor, plan: StandingPlan) -> Tensor:
        return causal_conv(x, conv, state, layer, plan)

    plan.note(again, x)
    num_before = state.shape[3]
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    places, own = conv.places.long(), state[:, :, layer]
    together = []
    for row in plan.rows():
        if row.is_single:
            together.append(row)
            continue
        before = _read(own[[row.slot]], places)[0]
        if row.is_first:
            before.zero_()
        inputs = torch.cat((before, x[row.tokens].float()))
        out[row.tokens] = _sums(inputs, conv).to(out.dtype)
        for num_tokens, to in row.stores:
            _write(own, [to], inputs[None, num_tokens : num_tokens + num_before], places)
    if together:
        tokens = torch.tensor([row.tokens.start for row in together], device=x.device)
        slots = [row.slot for row in together]
        before = _read(own[slots], places)
        before[[row.is_first for row in together]] = 0
        inputs = torch.cat((before, x[tokens, None].float()), 1)
        out[tokens] = _sums(inputs.transpose(0, 1), conv)[0].to(out.dtype)
        _write(own, slots, inputs[:, 1:], places)
    return out


def _read(states: Tensor, places: Tensor) -> Tensor:
    """[N, heads, K − 1, width] → [N, K − 1, C], float32."""
    by_token = states.transpose(1, 2).flatten(2)
    return by_token.index_select(2, places).float()


def _write(states: Tensor, slots: Sequence[int], last: Tensor, places: Tensor) -> None:
    """`last` [N, K − 1, C], into these slots of states [num_slots + 1, heads, K − 1, width]."""
    # More than the channels, where these are not shared out evenly.
    of_heads = last.new_zeros(*last.shape[:2], states.shape[1] * states.shape[3])
    of_heads.index_copy_(2, places, last)
    of_heads = of_heads.unflatten(2, (states.shape[1], -1)).transpose(1, 2)
    states[list(slots)] = of_heads.to(states.dtype)


def _sums(inputs: Tensor, conv: Conv) -> Tensor:
    """inputs [K − 1 + T, ..., C] → [T, ..., C], activated."""
    num_tokens = len(inputs) - len(conv.weight) + 1
    sums = inputs[:num_tokens] * conv.weight[0]
    if conv.bias is not None:
        sums.add_(conv.bias)
    for tap in range(1, len(conv.weight)):
        sums.add_(inputs[tap : tap + num_tokens] * conv.weight[tap])
    return sums if conv.activation is None else activate(sums, conv.activation)
