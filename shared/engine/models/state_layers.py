"""What layers that keep a state are made of beside their recurrence.

Such a layer asks for its tensors by a `State` in `cache_specs`, whose heads are those that ranks
share; gets them by name in `query` (`KvCache.caches`), with the place of its own among the layers;
and passes each on, with the plan of its group (kernels/state_plan.py), to the operation that
changes it. `query` does all that needs the state and returns what tokens make of it, whatever its
shape; `finish`, which has no state, projects that.

    kv = {"conv": [num_slots + 1, heads, layers, K − 1, width], …}
    x = ops.norm_linear(hidden, norm, projection)
    x = ops.causal_conv(x[:, channels], conv, kv["conv"], place, plan)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baton.kernels.reference import Activation
from baton.kernels.reference_conv import Conv, conv_places
from baton.shared.engine.model_loader import ModelLoader


def load_conv(
    load: ModelLoader,
    module: str,
    num_heads: int,
    units: Sequence[int],
    kernel: int,
    *,
    has_bias: bool = False,
    activation: Activation | None = "silu",
) -> Conv:
    """A checkpoint's `module`, this rank's share of it; `num_heads`: of all ranks.

    Channels come in sections, as [q of all heads, k of all heads, v of all heads]; a rank has its
    heads' of each.
    """
    num_channels = num_heads * sum(units)
    weight = load.numbers(f"{module}.weight", num_channels, 1, kernel, is_wide=True)
    bias = load.numbers(f"{module}.bias", num_channels, is_wide=True) if has_bias else None
    ranks = load.ops.ranks
    heads = ranks.share(num_heads, 1)
    num_own = heads.stop - heads.start
    own = _of_heads(num_heads, units, heads)
    return Conv(
        weight.view(num_channels, kernel)[own].t().contiguous(),
        None if bias is None else bias[own].contiguous(),
        conv_places(num_own, units).to(weight.device),
        activation,
    )


def _of_heads(num_heads: int, units: Sequence[int], heads: slice) -> slice | Tensor:
    """Which channels are these heads'."""
    if heads == slice(0, num_heads):
        return slice(None)
    first, channels = 0, []
    for unit in units:
        channels.append(torch.arange(first + heads.start * unit, first + heads.stop * unit))
        first += num_heads * unit
    return torch.cat(channels)
