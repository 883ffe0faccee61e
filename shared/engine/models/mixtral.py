"""Mixtral: a mistral with a mixture of experts in place of every MLP."""

from __future__ import annotations

from dataclasses import replace

from baton.kernels.routing import RoutingRule
from baton.shared.engine.models import llama, mistral
from baton.shared.engine.models.mixture_config import MixtureConfig, read_num_experts, read_top_k
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.models.model_type import ModelType, build_decoder
from baton.shared.engine.models.rope_fields import RopeRules
from baton.shared.model_files.fields import Fields

NAMES = {
    **llama.NAMES,
    "router": "block_sparse_moe.gate",
    "expert_gate": "block_sparse_moe.experts.{}.w1",
    "expert_up": "block_sparse_moe.experts.{}.w3",
    "expert_down": "block_sparse_moe.experts.{}.w2",
    "fused_gate_up": "block_sparse_moe.experts.gate_up_proj",
    "fused_down": "block_sparse_moe.experts.down_proj",
}


def configure(fields: Fields) -> ModelConfig:
    config = mistral.configure(fields, RopeRules(theta=1e6))
    num_experts = read_num_experts(fields, "num_local_experts", "num_experts")
    routing = RoutingRule(
        num_experts=num_experts, top_k=read_top_k(fields, num_experts), is_normalised=True
    )
    mixture = MixtureConfig(
        routing=routing,
        expert_size=config.intermediate_size,
        layers=(True,) * config.num_layers,
    )
    # Of training.
    fields.get("router_jitter_noise")
    return replace(config, mixture=mixture)


MIXTRAL = ModelType("mixtral", configure, build_decoder, (NAMES,))
