"""gpt-oss: every other layer attends within a window, heads have sinks, and every MLP is a mixture
of experts with biases, whose gate and up alternate and are clamped."""

from __future__ import annotations

from dataclasses import replace

from baton.kernels.routing import ClampedSwiglu, RoutingRule
from baton.shared.engine.models import llama
from baton.shared.engine.models.mixture_config import MixtureConfig, read_num_experts, read_top_k
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    LayerStyle,
    ModelConfig,
    read_decoder,
    read_heads,
    read_layer_types,
)
from baton.shared.engine.models.model_type import ModelType, build_decoder
from baton.shared.engine.models.rope_fields import RopeRules, read_rope
from baton.shared.engine.models.windows import every_nth_full, read_window_of
from baton.shared.model_files.fields import Fields

NAMES = {
    **llama.NAMES,
    "sinks": "self_attn.sinks",
    "router": "mlp.router",
    "fused_gate_up": "mlp.experts.gate_up_proj",
    "fused_down": "mlp.experts.down_proj",
}
_ROPE = RopeRules(
    theta=150000.0,
    default={
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
)


def configure(fields: Fields) -> ModelConfig:
    common = read_decoder(fields, experts_may_be_mxfp4=True)
    fields.only("hidden_act", "silu", "swish")
    num_layers, max_position = (
        fields.integer("num_hidden_layers"),
        common["max_position_embeddings"],
    )
    attention = AttentionConfig(
        **read_heads(fields, common["hidden_size"]), rope=read_rope(fields, max_position, _ROPE)
    )
    types = read_layer_types(fields, num_layers) or every_nth_full(2, num_layers)
    window = read_window_of(fields, types, max_position)
    has_bias = fields.boolean("attention_bias", default=True)
    return ModelConfig(
        **common,
        layers=tuple(
            replace(attention, window=window if each == "sliding_attention" else None)
            for each in types
        ),
        style=LayerStyle(
            qkv_bias=has_bias, output_bias=has_bias, has_sinks=True, has_wide_norms=True
        ),
        mixture=_mixture(fields, common["intermediate_size"], num_layers),
    )


def _mixture(fields: Fields, size: int, num_layers: int) -> MixtureConfig:
    num_experts = read_num_experts(fields, "num_local_experts", "num_experts")
    return MixtureConfig(
        routing=RoutingRule(
            num_experts=num_experts,
            top_k=read_top_k(fields, num_experts),
            scoring="softmax_of_chosen",
        ),
        expert_size=size,
        layers=(True,) * num_layers,
        activation=ClampedSwiglu(
            slope=fields.number("swiglu_alpha"), limit=fields.number("swiglu_limit")
        ),
        has_bias=True,
        alternates=True,
        may_be_mxfp4=fields.object("quantization_config") is not None,
    )


GPT_OSS = ModelType("gpt_oss", configure, build_decoder, (NAMES,))
