"""Qwen3: a qwen2 without those biases, but with norms of queries and keys. Qwen3-VL's text part is
one whose layers are all full."""

from __future__ import annotations

from baton.shared.engine.models import llama
from baton.shared.engine.models.model_config import LayerStyle, ModelConfig, read_decoder
from baton.shared.engine.models.model_type import ModelType, build_decoder
from baton.shared.engine.models.multimodal import text_part_of
from baton.shared.engine.models.qwen2 import read_layers
from baton.shared.engine.models.rope_fields import RopeRules
from baton.shared.model_files.fields import Fields

NAMES = {**llama.NAMES, "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}


def configure(fields: Fields) -> ModelConfig:
    common = read_decoder(fields)
    fields.only("hidden_act", "silu", "swish")
    return ModelConfig(**common, layers=read_layers(fields, common), style=_style(fields))


def configure_vl(fields: Fields) -> ModelConfig:
    return llama.configure(fields, RopeRules(theta=5e5), _style(fields))


def _style(fields: Fields) -> LayerStyle:
    has_bias = fields.boolean("attention_bias")
    return LayerStyle(qkv_bias=has_bias, output_bias=has_bias, has_qk_norm=True)


QWEN3 = ModelType("qwen3", configure, build_decoder, (NAMES,))
QWEN3_VL = text_part_of(
    "qwen3_vl",
    [ModelType("qwen3_vl_text", configure_vl, build_decoder, (NAMES,))],
    ignored_modules=["visual"],
)
