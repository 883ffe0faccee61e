"""Falcon-H1: in every layer attention and a mixer of Mamba2 side by side, an MLP behind them, and
numbers by which what goes in and comes out of each is multiplied."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from baton.shared.engine.models.granitemoehybrid import read_mamba
from baton.shared.engine.models.mamba2 import MIXER_NAMES
from baton.shared.engine.models.mamba_config import HybridConfig, skip
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    LayerStyle,
    read_decoder,
    read_heads,
)
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.models.rope_fields import read_rope
from baton.shared.model_files.fields import Fields

if TYPE_CHECKING:
    from baton.shared.engine.executor import Model
    from baton.shared.engine.model_loader import ModelLoader
    from baton.shared.engine.models.blocks import Names

NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.final_layernorm",
    "head": "lm_head",
    "layer": "model.layers.{}.",
    "input_norm": "input_layernorm",
    **{name: f"mamba.{module}" for name, module in MIXER_NAMES.items()},
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "mlp_norm": "pre_ff_layernorm",
    "gate": "feed_forward.gate_proj",
    "up": "feed_forward.up_proj",
    "down": "feed_forward.down_proj",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FalconH1Config(HybridConfig):
    """What is multiplied, beside what the mixers say of themselves."""

    attention_in: float
    """What attention gets."""
    attention_out: float
    """What it adds."""
    gate: float
    """The gate of an MLP, before its activation."""
    mlp_out: float


def configure(fields: Fields) -> FalconH1Config:
    common = read_decoder(fields)
    fields.only("hidden_act", "silu", "swish")
    num_layers = fields.integer("num_hidden_layers")
    heads = read_heads(fields, common["hidden_size"])
    # Keys are stored as they are, and scores multiplied.
    scale = fields.number("key_multiplier") * heads["head_dim"] ** -0.5
    rope = read_rope(fields, common["max_position_embeddings"])
    attention = AttentionConfig(**heads, rope=rope, scale=scale)
    skip(fields, "num_logits_to_keep", "mamba_expand")
    if fields.get("mamba_d_ssm") is None:
        what = "mamba_expand times hidden_size"
        inner = fields.integer("mamba_expand") * common["hidden_size"]
    else:
        what, inner = "mamba_d_ssm", fields.integer("mamba_d_ssm")
    mamba = replace(
        read_mamba(fields, inner, what=what, has_norm=fields.boolean("mamba_rms_norm")),
        norms_first=fields.boolean("mamba_norm_before_gate", default=True),
        has_output_bias=fields.boolean("projectors_bias"),
        input_scale=fields.number("ssm_in_multiplier"),
        input_scales=_read_multipliers(fields, "ssm_multipliers", 5),
        output_scale=fields.number("ssm_out_multiplier"),
    )
    gate, mlp_out = _read_multipliers(fields, "mlp_multipliers", 2)
    mlp_bias = fields.boolean("mlp_bias")
    if mlp_bias and gate != 1:
        raise fields.error(
            "mlp_multipliers", f"a gate multiplied by {gate} is not computed beside mlp_bias true"
        )
    has_bias = fields.boolean("attention_bias")
    return FalconH1Config(
        **common,
        layers=(attention,) * num_layers,
        states=(mamba.state_spec,) * num_layers,
        style=LayerStyle(qkv_bias=has_bias, output_bias=has_bias, mlp_bias=mlp_bias),
        embedding_scale=fields.number("embedding_multiplier"),
        logits_scale=fields.number("lm_head_multiplier"),
        mamba=mamba,
        attention_in=fields.number("attention_in_multiplier"),
        attention_out=fields.number("attention_out_multiplier"),
        gate=gate,
        mlp_out=mlp_out,
    )


def _read_multipliers(fields: Fields, name: str, count: int) -> tuple[float, ...]:
    """Null are ones."""
    if fields.get(name) is None:
        return (1.0,) * count
    found = fields.numbers(name)
    if len(found) != count:
        raise fields.error(name, f"has {len(found)} numbers, not {count}")
    return found


def build(config: FalconH1Config, load: ModelLoader, names: Names) -> Model:
    from functools import partial

    from baton.shared.engine.models.decoder import Decoder
    from baton.shared.engine.models.falcon_h1_layer import FalconH1Layer

    return Decoder(config, load, names, partial(FalconH1Layer, config, load, names))


FALCON_H1 = ModelType("falcon_h1", configure, build, (NAMES,))
