"""Granite 4: a granite most of whose layers have a mixer of Mamba2 in the place of an attention; an
MLP behind it, and perhaps a mixture of experts beside that; mostly without positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from baton.kernels.routing import RoutingRule
from baton.shared.engine.models.mamba2 import MIXER_NAMES
from baton.shared.engine.models.mamba_config import (
    ATTENTION,
    MAMBA,
    HybridConfig,
    MambaConfig,
    check_inner_size,
    check_num_layers,
    check_shape,
    read_head_dim,
    read_kinds,
    read_step_limit,
    skip,
)
from baton.shared.engine.models.mixture_config import MixtureConfig, read_top_k
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    LayerStyle,
    read_decoder,
    read_heads,
)
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.models.rope_config import NO_ROPE
from baton.shared.engine.models.rope_fields import read_rope
from baton.shared.model_files.fields import Fields

if TYPE_CHECKING:
    from baton.shared.engine.executor import Model
    from baton.shared.engine.model_loader import ModelLoader
    from baton.shared.engine.models.blocks import Names

NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "layer": "model.layers.{}.",
    "input_norm": "input_layernorm",
    **{name: f"mamba.{module}" for name, module in MIXER_NAMES.items()},
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    **dict.fromkeys(("gate", "up"), "shared_mlp.input_linear"),
    "down": "shared_mlp.output_linear",
    **dict.fromkeys(("shared_mlp_gate", "shared_mlp_up"), "shared_mlp.input_linear"),
    "shared_mlp_down": "shared_mlp.output_linear",
    "router": "block_sparse_moe.router.layer",
    "fused_gate_up": "block_sparse_moe.input_linear.weight",
    "fused_down": "block_sparse_moe.output_linear.weight",
}


def configure(fields: Fields) -> HybridConfig:
    common = read_decoder(fields)
    fields.only("hidden_act", "silu", "swish")
    kinds = read_kinds(fields, "layers_block_type", (MAMBA, ATTENTION))
    name = "layers_block_type"
    if kinds is None:
        name, kinds = "layer_types", read_kinds(fields, "layer_types", (MAMBA, ATTENTION))
    kinds = kinds or [MAMBA] * fields.integer("num_hidden_layers")
    check_num_layers(fields, name, kinds)
    has_rope = fields.get("position_embedding_type") == "rope"
    skip(fields, "rope_parameters", "rope_theta", "rope_scaling")
    rope = read_rope(fields, common["max_position_embeddings"]) if has_rope else NO_ROPE
    attention = AttentionConfig(
        **read_heads(fields, common["hidden_size"]),
        rope=rope,
        scale=fields.number("attention_multiplier"),
    )
    mamba = read_mamba(fields, fields.integer("mamba_expand") * common["hidden_size"])
    has_bias = fields.boolean("attention_bias")
    residual_scale = fields.number("residual_multiplier")
    shared_size = fields.integer("shared_intermediate_size")
    return HybridConfig(
        **{**common, "intermediate_size": shared_size},
        layers=tuple(attention if kind == ATTENTION else None for kind in kinds),
        states=tuple(mamba.state_spec if kind == MAMBA else None for kind in kinds),
        style=LayerStyle(qkv_bias=has_bias, output_bias=has_bias, residual_scale=residual_scale),
        embedding_scale=fields.number("embedding_multiplier"),
        logits_scale=1 / fields.number("logits_scaling"),
        mixture=_read_mixture(fields, len(kinds), shared_size, residual_scale),
        mamba=mamba,
    )


def read_mamba(
    fields: Fields,
    inner: int,
    *,
    what: str = "mamba_expand times hidden_size",
    has_norm: bool = True,
) -> MambaConfig:
    """Of what this type and falcon_h1 call alike. `inner`: the inner size, `what` in the file."""
    skip(fields, "mamba_chunk_size")
    num_heads = fields.integer("mamba_n_heads")
    head_dim = read_head_dim(fields, "mamba_d_head", "mamba_n_heads", inner, num_heads)
    num_groups = fields.integer("mamba_n_groups")
    check_inner_size(
        fields, "mamba_d_head", "mamba_n_heads", what=what,
        inner=inner, num_heads=num_heads, head_dim=head_dim,
    )  # fmt: skip
    check_shape(fields, heads="mamba_n_heads", groups="mamba_n_groups", num_heads=num_heads,
                num_groups=num_groups)  # fmt: skip
    has_bias = fields.boolean("mamba_proj_bias")
    return MambaConfig(
        num_heads=num_heads,
        head_dim=head_dim,
        state_size=fields.integer("mamba_d_state"),
        num_groups=num_groups,
        conv_kernel=fields.integer("mamba_d_conv", least=2),
        has_conv_bias=fields.boolean("mamba_conv_bias", default=True),
        has_input_bias=has_bias,
        has_output_bias=has_bias,
        has_norm=has_norm,
        **read_step_limit(fields),
    )


def _read_mixture(
    fields: Fields, num_layers: int, shared_size: int, residual_scale: float
) -> MixtureConfig | None:
    """In every layer, if any; zero experts are none."""
    num_experts = fields.integer("num_local_experts", least=0)
    if not num_experts:
        return None
    return MixtureConfig(
        # What experts add is scaled as what the MLP adds.
        routing=RoutingRule(
            num_experts=num_experts,
            top_k=read_top_k(fields, num_experts),
            scoring="softmax_of_chosen",
            scale=residual_scale,
        ),
        expert_size=fields.integer("intermediate_size"),
        layers=(True,) * num_layers,
        shared_size=shared_size,
    )


def build(config: HybridConfig, load: ModelLoader, names: Names) -> Model:
    from baton.shared.engine.models.blocks import Attention
    from baton.shared.engine.models.decoder import Decoder
    from baton.shared.engine.models.mamba import HybridLayer, MambaMixer
    from baton.shared.engine.models.mixture import load_mlp

    def make_layer(index: int) -> HybridLayer:
        prefix = names["layer"].format(index)
        make_mixer = MambaMixer if config.layers[index] is None else Attention
        mixer = make_mixer(config, load, names, prefix, index)
        mlp = load_mlp(config, load, names, prefix, index)
        return HybridLayer(config, load, names, index, mixer=mixer, mlp=mlp)

    return Decoder(config, load, names, make_layer)


GRANITEMOEHYBRID = ModelType("granitemoehybrid", configure, build, (NAMES,))
