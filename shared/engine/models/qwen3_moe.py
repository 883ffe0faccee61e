"""Qwen3 with mixtures of experts: a qwen3 whose layers have one in place of an MLP, all or some."""

from __future__ import annotations

from baton.kernels.routing import RoutingRule
from baton.shared.engine.models import qwen3
from baton.shared.engine.models.mixture_config import (
    MixtureConfig,
    read_num_experts,
    read_sparse_layers,
    read_top_k,
)
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    LayerStyle,
    ModelConfig,
    read_decoder,
    read_heads,
)
from baton.shared.engine.models.model_type import ModelType, build_decoder
from baton.shared.engine.models.rope_fields import read_rope
from baton.shared.engine.models.windows import read_window_if_used
from baton.shared.model_files.fields import Fields

EXPERT_NAMES = {
    "router": "mlp.gate",
    "expert_gate": "mlp.experts.{}.gate_proj",
    "expert_up": "mlp.experts.{}.up_proj",
    "expert_down": "mlp.experts.{}.down_proj",
    "fused_gate_up": "mlp.experts.gate_up_proj",
    "fused_down": "mlp.experts.down_proj",
}
NAMES = {**qwen3.NAMES, **EXPERT_NAMES}


def configure(fields: Fields) -> ModelConfig:
    common = read_decoder(fields)
    fields.only("hidden_act", "silu", "swish")
    num_layers, max_position = (
        fields.integer("num_hidden_layers"),
        common["max_position_embeddings"],
    )
    attention = AttentionConfig(
        **read_heads(fields, common["hidden_size"]),
        rope=read_rope(fields, max_position),
        window=read_window_if_used(fields, num_layers, max_position),
    )
    has_bias = fields.boolean("attention_bias")
    return ModelConfig(
        **common,
        layers=(attention,) * num_layers,
        style=LayerStyle(qkv_bias=has_bias, output_bias=has_bias, has_qk_norm=True),
        mixture=MixtureConfig(
            routing=read_routing(fields),
            expert_size=fields.integer("moe_intermediate_size"),
            layers=read_sparse_layers(fields, num_layers),
        ),
    )


def read_routing(fields: Fields) -> RoutingRule:
    num_experts = read_num_experts(fields, "num_experts", "num_local_experts")
    return RoutingRule(
        num_experts=num_experts,
        top_k=read_top_k(fields, num_experts),
        is_normalised=fields.boolean("norm_topk_prob"),
    )


QWEN3_MOE = ModelType("qwen3_moe", configure, build_decoder, (NAMES,))
