"""Qwen3.5: a qwen3_next whose projections stand apart, dense or with mixtures of experts in every
layer; also as the text part of models that see."""

from __future__ import annotations

from baton.kernels.routing import RoutingRule
from baton.shared.engine.models import qwen3_next
from baton.shared.engine.models.delta_config import DeltaModelConfig
from baton.shared.engine.models.mixture_config import read_num_experts, read_top_k
from baton.shared.engine.models.model_config import read_decoder, read_ends
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.models.multimodal import text_part_of
from baton.shared.model_files.fields import Fields

NAMES = {
    **qwen3_next.NAMES,
    **{f"delta_{each}": "linear_attn.in_proj_qkv" for each in ("q", "k", "v")},
    "delta_gate": "linear_attn.in_proj_z",
    "delta_strength": "linear_attn.in_proj_b",
    "delta_decay": "linear_attn.in_proj_a",
}


def configure(fields: Fields) -> DeltaModelConfig:
    return DeltaModelConfig(**qwen3_next.configure_layers(fields, read_decoder(fields)))


def configure_moe(fields: Fields) -> DeltaModelConfig:
    num_experts = read_num_experts(fields, "num_experts", "num_local_experts")
    routing = RoutingRule(
        num_experts=num_experts, top_k=read_top_k(fields, num_experts), is_normalised=True
    )
    layers = (True,) * fields.integer("num_hidden_layers")
    mixture = qwen3_next.read_mixture(fields, routing, layers)
    common = {
        **read_ends(fields),
        "max_position_embeddings": fields.integer("max_position_embeddings"),
        "intermediate_size": mixture.shared_size,
        "rms_norm_eps": fields.number("rms_norm_eps"),
    }
    return DeltaModelConfig(**qwen3_next.configure_layers(fields, common), mixture=mixture)


QWEN3_5_TEXT = ModelType(
    "qwen3_5_text",
    configure,
    qwen3_next.build,
    (NAMES,),
    ignored_modules=qwen3_next.IGNORED_MODULES,
)
QWEN3_5_MOE_TEXT = ModelType(
    "qwen3_5_moe_text",
    configure_moe,
    qwen3_next.build,
    (NAMES,),
    ignored_modules=qwen3_next.IGNORED_MODULES,
)
QWEN3_5 = text_part_of("qwen3_5", [QWEN3_5_TEXT], ignored_modules=["visual", "mtp"])
QWEN3_5_MOE = text_part_of("qwen3_5_moe", [QWEN3_5_MOE_TEXT], ignored_modules=["visual", "mtp"])
