"""Mistral: a llama without biases, all of whose layers may attend within a window."""

from __future__ import annotations

from baton.shared.engine.models import llama
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    ModelConfig,
    read_decoder,
    read_heads,
    read_layer_types,
)
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.models.rope_fields import read_rope
from baton.shared.model_files.fields import Fields

_WINDOW = 4096
"""Of a config.json that does not say; null says none."""


def configure(fields: Fields) -> ModelConfig:
    common = read_decoder(fields, max_position_embeddings=4096 * 32)
    fields.only("hidden_act", "silu", "swish")
    num_layers = fields.integer("num_hidden_layers")
    attention = AttentionConfig(
        **read_heads(fields, common["hidden_size"], num_kv_heads=8),
        rope=read_rope(fields, common["max_position_embeddings"]),
        window=_window(fields, num_layers, common["max_position_embeddings"]),
    )
    return ModelConfig(**common, layers=(attention,) * num_layers)


def _window(fields: Fields, num_layers: int, max_position_embeddings: int) -> int | None:
    window = None
    if fields.get("sliding_window") is not None or not fields.has("sliding_window"):
        window = fields.integer("sliding_window", default=_WINDOW)
    layer_types = set(read_layer_types(fields, num_layers) or ())
    if len(layer_types) > 1:
        raise fields.error("layer_types", "a mistral's layers are all of one type")
    if layer_types == {"sliding_attention"} and window is None:
        raise fields.error("layer_types", "sliding_attention, but sliding_window is null")
    # A window that nothing ever leaves is none.
    return window if window is None or window < max_position_embeddings else None


MISTRAL = ModelType("mistral", configure, llama.build)
