"""Qwen2: a llama with biases on queries, keys and values, whose upper layers may attend within a
window. Qwen2.5-VL's text part is one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from baton.shared.engine.models.llama import NAMES
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    LayerStyle,
    ModelConfig,
    read_decoder,
    read_heads,
)
from baton.shared.engine.models.model_type import ModelType, build_decoder
from baton.shared.engine.models.multimodal import text_part_of
from baton.shared.engine.models.rope_fields import LLAMA_RULES, RopeRules, read_rope
from baton.shared.engine.models.windows import read_upper_windows
from baton.shared.model_files.fields import Fields


def configure(fields: Fields, rope_rules: RopeRules = LLAMA_RULES) -> ModelConfig:
    common = read_decoder(fields)
    fields.only("hidden_act", "silu", "swish")
    layers = read_layers(fields, common, rope_rules)
    return ModelConfig(**common, layers=layers, style=LayerStyle(qkv_bias=True))


def read_layers(
    fields: Fields, common: dict[str, Any], rope_rules: RopeRules = LLAMA_RULES
) -> tuple[AttentionConfig, ...]:
    """The upper ones of which may attend within a window."""
    max_position = common["max_position_embeddings"]
    attention = AttentionConfig(
        **read_heads(fields, common["hidden_size"]),
        rope=read_rope(fields, max_position, rope_rules),
    )
    windows = read_upper_windows(fields, fields.integer("num_hidden_layers"), max_position)
    return tuple(replace(attention, window=window) for window in windows)


def configure_vl(fields: Fields) -> ModelConfig:
    return configure(fields, RopeRules(theta=1e6))


QWEN2 = ModelType("qwen2", configure, build_decoder, (NAMES,))
QWEN2_5_VL = text_part_of(
    "qwen2_5_vl",
    [ModelType("qwen2_5_vl_text", configure_vl, build_decoder, (NAMES,))],
    ignored_modules=["visual"],
    text_may_tie=True,
    may_be_flat=True,
)
