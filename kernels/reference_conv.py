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
from baton.kernels.state_plan import StatePlan


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


def causal_conv(x: Tensor, conv: Conv, state: Tensor, layer: int, plan: StatePlan) -> Tensor:
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
    num_before = state.shape[3]
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    places = conv.places.long()
    for tokens, slot, is_first, stores in plan.rows():
        own = x[tokens].float()
        if is_first:
            before = own.new_zeros(num_before, own.shape[1])
        else:
            before = state[slot, :, layer].transpose(0, 1).reshape(num_before, -1).float()
            before = before.index_select(1, places)
        inputs = torch.cat((before, own))
        sums = inputs[: len(own)] * conv.weight[0]
        if conv.bias is not None:
            sums.add_(conv.bias)
        for tap in range(1, num_before + 1):
            sums.add_(inputs[tap : tap + len(own)] * conv.weight[tap])
        if conv.activation is not None:
            sums = activate(sums, conv.activation)
        out[tokens] = sums.to(out.dtype)
        for num_tokens, to in stores:
            last = inputs[num_tokens : num_tokens + num_before]
            # More than the channels, where these are not shared out evenly.
            of_heads = last.new_zeros(num_before, state.shape[1] * state.shape[4])
            of_heads.index_copy_(1, places, last)
            of_heads = of_heads.view(num_before, state.shape[1], -1).transpose(0, 1)
            state[to, :, layer] = of_heads.to(state.dtype)
    return out
