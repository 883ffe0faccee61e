"""Llama: RMS norm, rotary grouped-query attention, SwiGLU; with or without biases."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.models.blocks import Attention, GatedMlp, Names
from baton.shared.engine.models.decoder import Decoder
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    ModelConfig,
    read_decoder,
    read_heads,
    read_layer_types,
    read_rope,
)
from baton.shared.engine.models.model_type import ModelType
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


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(ModelConfig):
    attention_bias: bool = False
    mlp_bias: bool = False


class LlamaLayer:
    """h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: LlamaConfig, load: ModelLoader, names: Names, index: int) -> None:
        prefix, size = names["layer"].format(index), config.hidden_size
        _, place = load.places[index]
        self._input_norm = load.norm(prefix + names["input_norm"], size, config.rms_norm_eps)
        self._attention = Attention(
            config.layers[index],
            load,
            names,
            prefix,
            place,
            hidden_size=size,
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
        )
        self._mlp_norm = load.norm(prefix + names["mlp_norm"], size, config.rms_norm_eps)
        self._mlp = GatedMlp(
            load,
            names,
            prefix,
            hidden_size=size,
            intermediate_size=config.intermediate_size,
            has_bias=config.mlp_bias,
        )

    def query(self, hidden: Tensor, rope: Any, kv: Tensor, plan: Any) -> Tensor:
        return self._attention.query(hidden, self._input_norm, rope, kv, plan)

    def finish(self, hidden: Tensor, query: Tensor, kv: Tensor, plan: Any) -> Tensor:
        hidden = self._attention.attend(hidden, query, kv, plan)
        return self._mlp(hidden, self._mlp_norm)


def configure(fields: Fields) -> LlamaConfig:
    common = read_decoder(fields, max_position_embeddings=2048)
    fields.only("hidden_act", "silu", "swish")
    num_layers = fields.integer("num_hidden_layers")
    _refuse_windows(fields, num_layers, common["max_position_embeddings"])
    attention = AttentionConfig(
        **read_heads(fields, common["hidden_size"]),
        rope=read_rope(fields, common["max_position_embeddings"]),
    )
    return LlamaConfig(
        **common,
        attention_bias=fields.boolean("attention_bias"),
        mlp_bias=fields.boolean("mlp_bias"),
        layers=(attention,) * num_layers,
    )


def build(config: LlamaConfig, load: ModelLoader) -> Decoder:
    return Decoder(config, load, NAMES, partial(LlamaLayer, config, load, NAMES))


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


LLAMA = ModelType("llama", configure, build)
