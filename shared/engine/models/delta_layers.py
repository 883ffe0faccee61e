"""Layers with a gated delta rule in place of attention, and layers whose attention has a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from baton.kernels.reference_delta import DeltaGates
from baton.kernels.reference_gated_norm import GatedNorm
from baton.shared.engine.linear import LinearSpec, Split
from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.models.blocks import Attention, Names, Piece, load_norm, parts
from baton.shared.engine.models.decoder import Decoder, Layer
from baton.shared.engine.models.delta_config import DeltaModelConfig
from baton.shared.engine.models.layers import PreNormLayer
from baton.shared.engine.models.mixture import load_mlp
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.models.state_layers import load_conv


class GatedAttentionLayer(PreNormLayer):
    """A `PreNormLayer` where what a head attends to is multiplied by a sigmoid of the token.

    Names: as of `PreNormLayer`, and output_gate, beside each head's query in its module.
    """

    def __init__(self, config: ModelConfig, load: ModelLoader, names: Names, index: int) -> None:
        super().__init__(config, load, names, index)
        own, style = config.layers[index], config.style
        assert own is not None
        self._ops = load.ops
        size, unit = own.num_heads * own.head_dim, own.head_dim
        gate = Piece("output_gate", size, style.qkv_bias, unit, between=(2 * unit, unit))
        pieces = parts(names, names["layer"].format(index), gate)
        self._gate = load.linear(LinearSpec(config.hidden_size, pieces, Split.COLUMNS))

    def finish(
        self, hidden: Tensor, query: Tensor, kv: Any, plan: Any, extra: Tensor | None = None
    ) -> Tensor:
        assert extra is None
        gate = self._ops.norm_linear(hidden, self._input_norm, self._gate)
        assert isinstance(self._attention, Attention)
        hidden = self._attention.attend(query, kv, plan, hidden, gate)
        return self._mlp(hidden, self._mlp_norm, hidden)


class DeltaLayer:
    """h + output(gated_norm(delta(conv(norm(h))))), then h + mlp(norm(h)).

    Names: input_norm, mlp_norm, those of `load_mlp`, and delta_q, _k, _v, _gate, _strength, _decay,
    conv, decay_rate, decay_bias, delta_norm, delta_output. Where queries and gates are in one
    module, each key head has its query, key, values and gates one after another there; strengths
    and decays likewise.
    """

    def __init__(
        self, config: DeltaModelConfig, load: ModelLoader, names: Names, index: int
    ) -> None:
        prefix, own, size = names["layer"].format(index), config.delta, config.hidden_size
        self._ops = load.ops
        _, self._place = load.places[config.num_layers + index]
        self._input_norm = load_norm(config, load, prefix + names["input_norm"])
        self._projection = load.linear(
            LinearSpec(size, parts(names, prefix, *_pieces(config, names)), Split.COLUMNS)
        )
        self._conv = load_conv(
            load, prefix + names["conv"], own.num_key_heads, own.units, own.kernel
        )
        self._gates = _load_gates(config, load, names, prefix)
        norm = load.norm(
            prefix + names["delta_norm"], own.value_dim, config.rms_norm_eps, is_wide=True
        )
        # All heads have the same.
        weight = norm.weight if norm.weight.is_meta else norm.weight.repeat(len(self._gates.rate))
        self._norm = GatedNorm(weight, own.value_dim, norm.eps, norms_first=True)
        output = parts(names, prefix, Piece("delta_output", size))
        in_unit = own.num_each * own.value_dim
        value_size = own.num_value_heads * own.value_dim
        self._output = load.linear(LinearSpec(value_size, output, Split.ROWS, in_unit=in_unit))
        self._mlp_norm = load_norm(config, load, prefix + names["mlp_norm"])
        self._mlp = load_mlp(config, load, names, prefix, index)
        self._value_dim = own.value_dim

    def query(self, hidden: Tensor, rope: Any, kv: Mapping[str, Tensor], plan: Any) -> Tensor:
        """→ [T, num_value_heads · value_dim]"""
        num_heads = len(self._gates.rate)
        num_channels, size = self._conv.weight.shape[1], num_heads * self._value_dim
        projected = self._ops.norm_linear(hidden, self._input_norm, self._projection)
        sizes = [num_channels, size, num_heads, num_heads]
        qkv, gate, strength, decay = torch.split(projected, sizes, 1)
        qkv = self._ops.causal_conv(qkv, self._conv, kv["conv"], self._place, plan)
        mixed = self._ops.gated_delta(
            qkv, strength, decay, self._gates, kv["delta"], self._place, plan
        )
        return self._ops.gated_norm(mixed.flatten(1), gate, self._norm)

    def finish(
        self, hidden: Tensor, query: Tensor, kv: Any, plan: Any, extra: Tensor | None = None
    ) -> Tensor:
        assert extra is None
        hidden = self._ops.linear(query, self._output, hidden)
        return self._mlp(hidden, self._mlp_norm, hidden)


def _pieces(config: DeltaModelConfig, names: Names) -> list[Piece]:
    """What is projected: all that goes through the convolution, the gates, strengths and decays."""
    own = config.delta
    units = {
        "delta_q": own.key_dim,
        "delta_k": own.key_dim,
        "delta_v": own.num_each * own.value_dim,
        "delta_gate": own.num_each * own.value_dim,
        "delta_strength": own.num_each,
        "delta_decay": own.num_each,
    }
    alternates = names["delta_q"] == names["delta_gate"]
    run: dict[str, int] = {}
    pieces = []
    for name, unit in units.items():
        start = run.get(names[name], 0)
        run[names[name]] = start + unit
        pieces.append((name, unit, start))
    return [
        Piece(
            name,
            own.num_key_heads * unit,
            unit=unit,
            between=(run[names[name]], start) if alternates else None,
        )
        for name, unit, start in pieces
    ]


def _load_gates(
    config: DeltaModelConfig, load: ModelLoader, names: Names, prefix: str
) -> DeltaGates:
    own = config.delta
    rate, bias = (
        load.numbers(prefix + names[name], own.num_value_heads, is_wide=True)
        for name in ("decay_rate", "decay_bias")
    )
    share = load.ops.ranks.share(own.num_value_heads, own.num_each)
    if not rate.is_meta:
        # The logarithm is stored.
        rate = torch.exp(rate)
    return DeltaGates(rate[share], bias[share])


def build(config: DeltaModelConfig, load: ModelLoader, names: Names) -> Decoder:
    def make_layer(index: int) -> Layer:
        kind = DeltaLayer if config.layers[index] is None else GatedAttentionLayer
        return kind(config, load, names, index)

    return Decoder(config, load, names, make_layer)
