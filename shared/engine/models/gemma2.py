"""Gemma 2: norms of what attention and MLP add, capped scores and logits, every other layer with a
window."""

from __future__ import annotations

from dataclasses import replace

from baton.shared.engine.models import llama
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    LayerStyle,
    ModelConfig,
    read_activation,
    read_cap,
    read_decoder,
    read_heads,
    read_layer_types,
)
from baton.shared.engine.models.model_type import ModelType, build_decoder
from baton.shared.engine.models.rope_fields import read_rope
from baton.shared.engine.models.windows import every_nth_full, read_window_of
from baton.shared.model_files.fields import Fields

NAMES = {
    **llama.NAMES,
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def configure(fields: Fields) -> ModelConfig:
    fields.only("use_bidirectional_attention", False)
    common = read_decoder(fields)
    max_position = common["max_position_embeddings"]
    num_layers = fields.integer("num_hidden_layers")
    types = read_layer_types(fields, num_layers) or every_nth_full(2, num_layers)
    full = AttentionConfig(
        **read_heads(fields, common["hidden_size"]),
        rope=read_rope(fields, max_position),
        scale=fields.number("query_pre_attn_scalar") ** -0.5,
        soft_cap=read_cap(fields, "attn_logit_softcapping"),
    )
    sliding = replace(full, window=read_window_of(fields, types, max_position))
    return ModelConfig(
        **common,
        layers=tuple(full if each == "full_attention" else sliding for each in types),
        style=read_style(fields),
        embedding_scale=common["hidden_size"] ** 0.5,
        logits_soft_cap=read_cap(fields, "final_logit_softcapping"),
    )


def read_style(fields: Fields) -> LayerStyle:
    has_bias = fields.boolean("attention_bias")
    return LayerStyle(
        qkv_bias=has_bias,
        output_bias=has_bias,
        activation=read_activation(fields, "hidden_activation"),
        has_post_norms=True,
        norm_plus_one=True,
    )


GEMMA2 = ModelType("gemma2", configure, build_decoder, (NAMES,))
