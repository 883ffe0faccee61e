"""Qwen3-Next: three layers of four have a gated delta rule in place of attention; the attention of
the others has a gate behind it, and a quarter of each head turns. Mixtures of experts beside an
expert that every token has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from baton.kernels.routing import RoutingRule
from baton.shared.engine.models import qwen2_moe, qwen3
from baton.shared.engine.models.delta_config import (
    DeltaModelConfig,
    by_layer,
    read_delta,
    read_linear_layers,
)
from baton.shared.engine.models.mixture_config import MixtureConfig, read_sparse_layers
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    LayerStyle,
    read_decoder,
    read_heads,
)
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.models.qwen3_moe import read_routing
from baton.shared.engine.models.rope_fields import RopeRules, read_rope
from baton.shared.model_files.fields import Fields

if TYPE_CHECKING:
    from baton.shared.engine.executor import Model
    from baton.shared.engine.model_loader import ModelLoader
    from baton.shared.engine.models.blocks import Names

NAMES = {
    **qwen2_moe.NAMES,
    **qwen3.NAMES,
    "output_gate": "self_attn.q_proj",
    "conv": "linear_attn.conv1d",
    "decay_rate": "linear_attn.A_log",
    "decay_bias": "linear_attn.dt_bias",
    "delta_norm": "linear_attn.norm",
    "delta_output": "linear_attn.out_proj",
    **{f"delta_{each}": "linear_attn.in_proj_qkvz" for each in ("q", "k", "v", "gate")},
    **{f"delta_{each}": "linear_attn.in_proj_ba" for each in ("strength", "decay")},
}
IGNORED_MODULES = ("mtp.",)
"""What guesses tokens ahead."""
FIELDS_OF_LAYER_BESIDE = (
    "mtp_num_hidden_layers",
    "num_nextn_predict_layers",
    "mtp_use_dedicated_embeddings",
)
ROPE = RopeRules(partial_rotary_factor=0.25)


def configure(fields: Fields) -> DeltaModelConfig:
    config = configure_layers(fields, read_decoder(fields))
    mixture = read_mixture(
        fields,
        read_routing(fields),
        read_sparse_layers(fields, fields.integer("num_hidden_layers")),
    )
    return DeltaModelConfig(**config, mixture=mixture)


def configure_layers(fields: Fields, common: dict[str, Any]) -> dict[str, Any]:
    """What a config has of `DeltaModelConfig` but for what is behind attention and rule. `common`:
    the fields that all decoders have."""
    # The convolution's too.
    fields.only("hidden_act", "silu", "swish")
    fields.only("attn_output_gate", True)
    # States are float32 whatever it says; who guesses by a layer beside the model reads the others.
    for name in ("mamba_ssm_dtype", *FIELDS_OF_LAYER_BESIDE):
        fields.get(name)
    has_bias = fields.boolean("attention_bias")
    attention = AttentionConfig(
        **read_heads(fields, common["hidden_size"]),
        rope=read_rope(fields, common["max_position_embeddings"], ROPE),
    )
    delta = read_delta(fields)
    return {
        **common,
        **by_layer(read_linear_layers(fields), attention, delta),
        "delta": delta,
        "style": LayerStyle(
            qkv_bias=has_bias,
            output_bias=has_bias,
            has_qk_norm=True,
            norm_plus_one=True,
            has_output_gate=True,
        ),
    }


def read_mixture(fields: Fields, routing: RoutingRule, layers: tuple[bool, ...]) -> MixtureConfig:
    return MixtureConfig(
        routing=routing,
        expert_size=fields.integer("moe_intermediate_size"),
        layers=layers,
        shared_size=fields.integer("shared_expert_intermediate_size"),
        has_shared_gate=True,
    )


def build(config: DeltaModelConfig, load: ModelLoader, names: Names) -> Model:
    from baton.shared.engine.models import delta_layers

    return delta_layers.build(config, load, names)


QWEN3_NEXT = ModelType("qwen3_next", configure, build, (NAMES,), ignored_modules=IGNORED_MODULES)
