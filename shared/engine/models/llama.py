"""Llama: RMS norm, rotary grouped-query attention, SwiGLU; with or without biases."""

from __future__ import annotations

from functools import partial

from baton.shared.engine.models import decoder
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    LayerStyle,
    ModelConfig,
    read_decoder,
    read_heads,
    read_layer_types,
)
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.models.rope_fields import read_rope
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


def configure(fields: Fields) -> ModelConfig:
    common = read_decoder(fields, max_position_embeddings=2048)
    fields.only("hidden_act", "silu", "swish")
    num_layers = fields.integer("num_hidden_layers")
    _refuse_windows(fields, num_layers, common["max_position_embeddings"])
    attention = AttentionConfig(
        **read_heads(fields, common["hidden_size"]),
        rope=read_rope(fields, common["max_position_embeddings"]),
    )
    has_bias = fields.boolean("attention_bias")
    return ModelConfig(
        **common,
        layers=(attention,) * num_layers,
        style=LayerStyle(
            qkv_bias=has_bias, output_bias=has_bias, mlp_bias=fields.boolean("mlp_bias")
        ),
    )


def _refuse_windows(fields: Fields, num_layers: int, max_position_embeddings: int) -> None:
    """Llama's masks know none; but transformers' cache, if nothing tells it that all layers are
    full, keeps only a window's positions."""
    layer_types = read_layer_types(fields, num_layers)
    if layer_types is not None:
        if set(layer_types) != {"full_attention"}:
            raise fields.error("layer_types", "a llama has no layers but full_attention")
        return
    for name in ("sliding_window", "attention_chunk_size"):
        if fields.get(name) is not None and fields.integer(name) < max_position_embeddings:
            raise fields.error(name, f"a llama has none, not {fields.get(name)}")


build = partial(decoder.build, names=NAMES)

LLAMA = ModelType("llama", configure, build)
