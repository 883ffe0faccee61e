"""Llama: RMS norm, rotary grouped-query attention, SwiGLU; with or without biases."""

from __future__ import annotations

from baton.shared.engine.models.model_config import (
    AttentionConfig,
    LayerStyle,
    ModelConfig,
    read_decoder,
    read_heads,
)
from baton.shared.engine.models.model_type import ModelType, build_decoder
from baton.shared.engine.models.rope_fields import LLAMA_RULES, RopeRules, read_rope
from baton.shared.engine.models.windows import refuse_windows
from baton.shared.model_files.fields import Fields

NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "layer": "model.layers.{}.",
    "input_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def configure(
    fields: Fields, rope_rules: RopeRules = LLAMA_RULES, style: LayerStyle | None = None
) -> ModelConfig:
    """`style`: of a type that has one of its own."""
    common = read_decoder(fields)
    fields.only("hidden_act", "silu", "swish")
    num_layers = fields.integer("num_hidden_layers")
    refuse_windows(fields, num_layers, common["max_position_embeddings"])
    attention = AttentionConfig(
        **read_heads(fields, common["hidden_size"]),
        rope=read_rope(fields, common["max_position_embeddings"], rope_rules),
    )
    return ModelConfig(
        **common, layers=(attention,) * num_layers, style=style or _read_style(fields)
    )


def _read_style(fields: Fields) -> LayerStyle:
    has_bias = fields.boolean("attention_bias")
    return LayerStyle(qkv_bias=has_bias, output_bias=has_bias, mlp_bias=fields.boolean("mlp_bias"))


LLAMA = ModelType("llama", configure, build_decoder, (NAMES,))
