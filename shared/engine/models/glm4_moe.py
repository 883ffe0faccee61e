"""GLM-4.5: norms before attention and MLP alone, half of each head turns; behind some dense layers
mixtures whose experts are chosen by sigmoids and a bias, from groups, beside one that every token
has."""

from __future__ import annotations

from dataclasses import replace

from baton.kernels.routing import RoutingRule
from baton.shared.engine.models import decoder, llama, qwen3, qwen3_moe
from baton.shared.engine.models.mixture_config import (
    MixtureConfig,
    read_groups,
    read_num_experts,
    read_top_k,
)
from baton.shared.engine.models.model_config import LayerStyle, ModelConfig
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.models.rope_fields import RopeRules
from baton.shared.model_files.fields import Fields

NAMES = {
    **qwen3.NAMES,
    **qwen3_moe.EXPERT_NAMES,
    "choice_bias": "mlp.gate.e_score_correction_bias",
    **{f"shared_mlp_{name}": f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")},
}
_ROPE = RopeRules(partial_rotary_factor=0.5)


def configure(fields: Fields) -> ModelConfig:
    style = LayerStyle(
        qkv_bias=fields.boolean("attention_bias"), has_qk_norm=fields.boolean("use_qk_norm")
    )
    config = llama.configure(fields, _ROPE, style)
    num_experts = read_num_experts(fields, "n_routed_experts", "num_local_experts", "num_experts")
    top_k = read_top_k(fields, num_experts)
    num_groups, top_groups = read_groups(fields, num_experts, top_k)
    size = fields.integer("moe_intermediate_size")
    first = fields.integer("first_k_dense_replace", least=0)
    mixture = MixtureConfig(
        routing=RoutingRule(
            num_experts=num_experts,
            top_k=top_k,
            scoring="sigmoid",
            is_normalised=fields.boolean("norm_topk_prob", default=True),
            floor=1e-20,
            scale=fields.number("routed_scaling_factor"),
            num_groups=num_groups,
            top_groups=top_groups,
        ),
        expert_size=size,
        layers=tuple(index >= first for index in range(config.num_layers)),
        has_choice_bias=True,
        shared_size=size * fields.integer("n_shared_experts"),
    )
    for name in ("num_nextn_predict_layers", "num_mtp_layers"):
        fields.get(name)
    return replace(config, mixture=mixture)


GLM4_MOE = ModelType("glm4_moe", configure, decoder.build, (NAMES,), ignores_layers_ahead=True)
