"""SmolLM3: a llama some of whose layers do not know positions; these may attend within a window."""

from __future__ import annotations

from dataclasses import replace

from baton.shared.engine.models.llama import NAMES
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    LayerStyle,
    ModelConfig,
    read_decoder,
    read_heads,
)
from baton.shared.engine.models.model_type import ModelType, build_decoder
from baton.shared.engine.models.rope_config import NO_ROPE
from baton.shared.engine.models.rope_fields import RopeRules, read_rope
from baton.shared.engine.models.windows import read_windows
from baton.shared.model_files.fields import Fields

_ROPE = RopeRules(theta=2e6)


def configure(fields: Fields) -> ModelConfig:
    common = read_decoder(fields)
    fields.only("hidden_act", "silu", "swish")
    max_position = common["max_position_embeddings"]
    attention = AttentionConfig(
        **read_heads(fields, common["hidden_size"]), rope=read_rope(fields, max_position, _ROPE)
    )
    has_rope = _read_has_rope(fields, fields.integer("num_hidden_layers"))
    windows = read_windows(fields, [not each for each in has_rope], max_position)
    has_bias = fields.boolean("attention_bias")
    return ModelConfig(
        **common,
        layers=tuple(
            replace(attention, rope=attention.rope if turns else NO_ROPE, window=window)
            for turns, window in zip(has_rope, windows, strict=True)
        ),
        style=LayerStyle(
            qkv_bias=has_bias, output_bias=has_bias, mlp_bias=fields.boolean("mlp_bias")
        ),
    )


def _read_has_rope(fields: Fields, num_layers: int) -> list[bool]:
    """By layer. `no_rope_layers` has 1 for those with rope, whatever its name."""
    interval = fields.integer("no_rope_layer_interval")
    given = fields.integers("no_rope_layers")
    if given is None:
        return [(index + 1) % interval != 0 for index in range(num_layers)]
    if len(given) < num_layers:
        raise fields.error(
            "no_rope_layers", f"has {len(given)} entries for {num_layers} hidden layers"
        )
    if not set(given) <= {0, 1}:
        raise fields.error("no_rope_layers", "entries must be 0 or 1")
    return [each == 1 for each in given[:num_layers]]


SMOLLM3 = ModelType("smollm3", configure, build_decoder, (NAMES,))
