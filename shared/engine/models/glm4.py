"""GLM-4 (0414): norms before and behind attention and MLP, and half of each head turns, in pairs of
neighbours."""

from __future__ import annotations

from baton.shared.engine.models import llama
from baton.shared.engine.models.model_config import LayerStyle, ModelConfig
from baton.shared.engine.models.model_type import ModelType, build_decoder
from baton.shared.engine.models.rope_fields import RopeRules
from baton.shared.model_files.fields import Fields

NAMES = {
    **llama.NAMES,
    "attention_post_norm": "post_self_attn_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_mlp_layernorm",
    **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
}
_ROPE = RopeRules(partial_rotary_factor=0.5, is_interleaved=True)


def configure(fields: Fields) -> ModelConfig:
    style = LayerStyle(qkv_bias=fields.boolean("attention_bias"), has_post_norms=True)
    return llama.configure(fields, _ROPE, style)


GLM4 = ModelType("glm4", configure, build_decoder, (NAMES,))
