"""Mamba2's mixer, and layers of which some parts may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from baton.kernels.reference_conv import Conv
from baton.kernels.reference_gated_norm import GatedNorm
from baton.kernels.reference_ssd import SsdWeights
from baton.shared.engine.linear import LinearSpec
from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.models.blocks import Attention, GatedMlp, Names, Piece, load_norm, parts
from baton.shared.engine.models.mamba_config import HybridConfig, MambaConfig
from baton.shared.engine.models.mixture import Mixture
from baton.shared.engine.operations import Norm


class MambaMixer:
    """The recurrence of Mamba2 behind a short convolution, gated, normalised and projected.

    Its state are the tensors "ssm" and "conv" of the layer's cache group.
    """

    def __init__(
        self, config: HybridConfig, load: ModelLoader, names: Names, prefix: str, index: int
    ) -> None:
        """Of layer `index`. `names`: input, conv, dt_bias, a_log, d, mixed; gated_norm where there
        is one."""
        own = config.mamba
        self._ops = load.ops
        _, self._place = load.places[config.num_layers + index]
        self._sizes = [own.inner_size, own.conv_size, own.num_heads]
        self._input_scale = own.input_scale
        made = parts(names, prefix, Piece("input", sum(self._sizes), own.has_input_bias))
        self._input = load.linear(LinearSpec(config.hidden_size, made))
        self._conv = _load_conv(own, load, prefix + names["conv"])
        self._ssd = _load_ssd(own, load, names, prefix)
        weight = None
        if own.has_norm:
            module = prefix + names["gated_norm"]
            weight = load.norm(module, own.inner_size, config.rms_norm_eps, is_wide=True).weight
        self._gated_norm = GatedNorm(
            weight,
            own.inner_size // own.num_groups,
            config.rms_norm_eps,
            norms_first=own.norms_first,
            gate_scale=own.input_scales[0],
        )
        mixed = parts(names, prefix, Piece("mixed", config.hidden_size, own.has_output_bias))
        scale = own.output_scale * config.style.residual_scale
        self._output = load.linear(LinearSpec(own.inner_size, mixed, scale=scale))

    def query(
        self, hidden: Tensor, norm: Norm, rope: Any, state: Mapping[str, Tensor], plan: Any
    ) -> Tensor:
        """Of norm(hidden [T, hidden]) → [T, inner size]; moves the rows' states on."""
        norm = scaled_norm(norm, self._input_scale)
        made = self._ops.norm_linear(hidden, norm, self._input)
        gate, x, dt = torch.split(made, self._sizes, -1)
        x = self._ops.causal_conv(x, self._conv, state["conv"], self._place, plan)
        y = self._ops.ssd(x, dt, self._ssd, state["ssm"], self._place, plan)
        return self._ops.gated_norm(y.flatten(1), gate, self._gated_norm)

    def attend(
        self, query: Tensor, state: Any, plan: Any, residual: Tensor | None = None
    ) -> Tensor:
        """What was read of the states, projected → [T, hidden], plus the residual of that shape."""
        return self._ops.linear(query, self._output, residual)


def scaled_norm(norm: Norm, scale: float) -> Norm:
    """One whose result is multiplied, before it is rounded."""
    if scale == 1 or norm.weight.is_meta:
        return norm
    return replace(norm, weight=norm.weight.float() * scale)


def _load_conv(own: MambaConfig, load: ModelLoader, module: str) -> Conv:
    """Scales of x, b and c are in the weights: what they scale goes nowhere else."""
    weight = load.numbers(f"{module}.weight", own.conv_size, 1, own.conv_kernel, is_wide=True)
    bias = None
    if own.has_conv_bias:
        bias = load.numbers(f"{module}.bias", own.conv_size, is_wide=True)
    places = _conv_places(own)
    if not weight.is_meta:
        _, *scales, _ = own.input_scales
        sizes = [own.inner_size, own.group_width, own.group_width]
        for part, scale in zip(torch.split(weight, sizes), scales, strict=True):
            part.mul_(scale)
        places = places.to(weight.device)
    weight = weight.view(own.conv_size, own.conv_kernel).t().contiguous()
    return Conv(weight, bias, places, own.activation)


def _conv_places(own: MambaConfig) -> Tensor:
    """Where a state has each channel: a head has its own of x, and its share of its group's b and
    c."""
    width, share = own.head_dim + own.group_share, own.group_share
    heads_each = own.num_heads // own.num_groups
    of_x = torch.arange(own.num_heads)[:, None] * width + torch.arange(own.head_dim)
    of_group = torch.arange(2 * own.state_size)
    first_heads = torch.arange(own.num_groups)[:, None] * heads_each
    of_both = (first_heads + of_group // share) * width + own.head_dim + of_group % share
    of_b, of_c = torch.split(of_both, own.state_size, 1)
    return torch.cat([each.flatten() for each in (of_x, of_b, of_c)]).int()


def _load_ssd(own: MambaConfig, load: ModelLoader, names: Names, prefix: str) -> SsdWeights:
    a_log, d, dt_bias = (
        load.numbers(prefix + names[name], own.num_heads, is_wide=True)
        for name in ("a_log", "d", "dt_bias")
    )
    return SsdWeights(
        a=a_log if a_log.is_meta else -a_log.exp(),
        d=d,
        dt_bias=dt_bias,
        num_groups=own.num_groups,
        dt_scale=own.input_scales[4],
        dt_min=own.dt_min,
        dt_max=own.dt_max,
    )


class UngatedMlp:
    """relu(up)², projected down."""

    def __init__(
        self, config: HybridConfig, load: ModelLoader, names: Names, prefix: str, size: int
    ) -> None:
        """`names`: up, down."""
        self._ops = load.ops
        has_bias = config.style.mlp_bias
        up = parts(names, prefix, Piece("up", size, has_bias))
        self._up = load.linear(LinearSpec(config.hidden_size, up))
        down = parts(names, prefix, Piece("down", config.hidden_size, has_bias))
        self._down = load.linear(LinearSpec(size, down))

    def __call__(self, hidden: Tensor, norm: Norm, residual: Tensor | None = None) -> Tensor:
        """mlp(norm(hidden)) + residual, [T, hidden] each."""
        x = self._ops.norm_linear(hidden, norm, self._up)
        return self._ops.linear(self._ops.activate_and_mul(x, x, "relu"), self._down, residual)


Mlp = GatedMlp | UngatedMlp | Mixture


class HybridLayer:
    """h + mixer(norm(h)), then h + mlp(norm(h)); either may be missing.

    Names: input_norm, and mlp_norm where both are there.
    """

    def __init__(
        self,
        config: HybridConfig,
        load: ModelLoader,
        names: Names,
        index: int,
        *,
        mixer: Attention | MambaMixer | None = None,
        mlp: Any = None,
    ) -> None:
        """`mlp`: a `GatedMlp`, or what is called as one."""
        prefix = names["layer"].format(index)
        self._mixer, self._mlp = mixer, mlp
        self._norm = load_norm(config, load, prefix + names["input_norm"])
        self._mlp_norm = self._norm
        if mixer is not None and mlp is not None:
            self._mlp_norm = load_norm(config, load, prefix + names["mlp_norm"])

    def query(self, hidden: Tensor, rope: Any, kv: Any, plan: Any) -> Tensor:
        if self._mixer is None:
            return hidden
        return self._mixer.query(hidden, self._norm, rope, kv, plan)

    def finish(
        self, hidden: Tensor, query: Tensor, kv: Any, plan: Any, extra: Tensor | None = None
    ) -> Tensor:
        assert extra is None
        if self._mixer is not None:
            hidden = self._mixer.attend(query, kv, plan, hidden)
        if self._mlp is not None:
            mixed: Tensor = self._mlp(hidden, self._mlp_norm, hidden)
            return mixed
        return hidden
