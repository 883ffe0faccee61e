"""Mistral: a llama without biases, all of whose layers may attend within a window."""

from __future__ import annotations

from baton.shared.engine.models.llama import NAMES
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    ModelConfig,
    read_decoder,
    read_heads,
)
from baton.shared.engine.models.model_type import ModelType, build_decoder
from baton.shared.engine.models.rope_fields import LLAMA_RULES, RopeRules, read_rope
from baton.shared.engine.models.windows import read_window
from baton.shared.model_files.fields import Fields


def configure(fields: Fields, rope_rules: RopeRules = LLAMA_RULES) -> ModelConfig:
    common = read_decoder(fields)
    fields.only("hidden_act", "silu", "swish")
    num_layers = fields.integer("num_hidden_layers")
    attention = AttentionConfig(
        **read_heads(fields, common["hidden_size"]),
        rope=read_rope(fields, common["max_position_embeddings"], rope_rules),
        window=read_window(fields, num_layers, common["max_position_embeddings"]),
    )
    return ModelConfig(**common, layers=(attention,) * num_layers)


MISTRAL = ModelType("mistral", configure, build_decoder, (NAMES,))
