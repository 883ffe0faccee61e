"""DeepSeek's models with latents in the cache: behind some dense layers mixtures, of version 2
chosen by a softmax, of version 3 by sigmoids and a bias. Kimi K2 is a version 3 by another name."""

from __future__ import annotations

from dataclasses import replace

from baton.kernels.routing import RoutingRule
from baton.shared.engine.models import glm4_moe
from baton.shared.engine.models.mixture_config import (
    MixtureConfig,
    read_first_dense,
    read_groups,
    read_num_experts,
    read_sigmoid_mixture,
    read_top_k,
)
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    LatentConfig,
    LayerStyle,
    ModelConfig,
    read_decoder,
    read_head_dim,
)
from baton.shared.engine.models.model_type import ModelType, build_decoder
from baton.shared.engine.models.rope_config import RopeConfig
from baton.shared.engine.models.rope_fields import RopeRules, read_rope
from baton.shared.model_files.fields import Fields, shown

NAMES = {
    **{name: module for name, module in glm4_moe.NAMES.items() if name not in ("q", "k", "v")},
    "query": "self_attn.q_proj",
    "query_latent": "self_attn.q_a_proj",
    "query_norm": "self_attn.q_a_layernorm",
    "query_of_latent": "self_attn.q_b_proj",
    **dict.fromkeys(("latent", "turned_key"), "self_attn.kv_a_proj_with_mqa"),
    "latent_norm": "self_attn.kv_a_layernorm",
    "heads": "self_attn.kv_b_proj",
}


def configure_without_mixture(
    fields: Fields, *, is_interleaved: bool, mlp_bias: bool = False
) -> ModelConfig:
    """What all have in common."""
    common = read_decoder(fields)
    fields.only("hidden_act", "silu", "swish")
    has_bias = fields.boolean("attention_bias")
    rules = RopeRules(is_interleaved=is_interleaved, has_score_factor=True)
    rope = read_rope(fields, common["max_position_embeddings"], rules)
    attention = _read_attention(fields, rope)
    for name in ("num_nextn_predict_layers", "num_mtp_layers"):
        fields.get(name)
    return ModelConfig(
        **common,
        layers=(attention,) * fields.integer("num_hidden_layers"),
        style=LayerStyle(qkv_bias=has_bias, output_bias=has_bias, mlp_bias=mlp_bias),
    )


def _read_attention(fields: Fields, rope: RopeConfig) -> AttentionConfig:
    num_heads = fields.integer("num_attention_heads")
    # Each head has a key and a value of its own.
    fields.only("num_key_value_heads", num_heads)
    rope_dim = read_head_dim(fields, "qk_rope_head_dim")
    # transformers writes it beside the other sizes, and does not read it.
    for name in ("head_dim", "qk_head_dim"):
        fields.get(name)
    has_query_latent = fields.get("q_lora_rank") is not None
    latent = LatentConfig(
        rank=fields.integer("kv_lora_rank"),
        key_dim=fields.integer("qk_nope_head_dim"),
        value_dim=fields.integer("v_head_dim"),
        query_rank=fields.integer("q_lora_rank") if has_query_latent else None,
    )
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=rope_dim,
        rope=rope,
        scale=(latent.key_dim + rope_dim) ** -0.5 * rope.score_factor,
        latent=latent,
    )


def _configure_v2(fields: Fields) -> ModelConfig:
    fields.only("scoring_func", "softmax")
    fields.only("moe_layer_freq", 1)
    # transformers writes it, and does not read it: weights are never normalised.
    fields.get("norm_topk_prob")
    mlp_bias = fields.boolean("mlp_bias")
    config = configure_without_mixture(fields, is_interleaved=True, mlp_bias=mlp_bias)
    num_experts = read_num_experts(fields, "n_routed_experts", "num_experts")
    top_k = read_top_k(fields, num_experts)
    num_groups, top_groups = 1, 1
    if _is_group_limited(fields):
        num_groups, top_groups = read_groups(fields, num_experts, top_k, group_best=1)
    size = fields.integer("moe_intermediate_size")
    mixture = MixtureConfig(
        routing=RoutingRule(
            num_experts=num_experts,
            top_k=top_k,
            scale=fields.number("routed_scaling_factor"),
            num_groups=num_groups,
            top_groups=top_groups,
            group_best=1,
        ),
        expert_size=size,
        layers=read_first_dense(fields, config.num_layers),
        shared_size=size * fields.integer("n_shared_experts"),
    )
    return replace(config, mixture=mixture)


def _is_group_limited(fields: Fields) -> bool:
    name, methods = "topk_method", ("greedy", "group_limited_greedy")
    method = fields.string(name)
    if method not in methods:
        known = " or ".join(map(shown, methods))
        raise fields.error(name, f"only {known} is supported, not {shown(method)}")
    return method == methods[1]


def _configure_v3(fields: Fields) -> ModelConfig:
    fields.only("moe_layer_freq", 1)
    config = configure_with_sigmoids(fields)
    mixture = read_sigmoid_mixture(fields, read_first_dense(fields, config.num_layers))
    return replace(config, mixture=mixture)


def configure_with_sigmoids(fields: Fields) -> ModelConfig:
    """As `configure_without_mixture`, of types whose experts are chosen as version 3's."""
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    is_interleaved = fields.boolean("rope_interleave")
    return configure_without_mixture(fields, is_interleaved=is_interleaved)


DEEPSEEK_V2 = ModelType(
    "deepseek_v2", _configure_v2, build_decoder, (NAMES,), ignores_layers_ahead=True
)
DEEPSEEK_V3 = ModelType(
    "deepseek_v3", _configure_v3, build_decoder, (NAMES,), ignores_layers_ahead=True
)
KIMI_K2 = replace(DEEPSEEK_V3, name="kimi_k2")
