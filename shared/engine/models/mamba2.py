"""Mamba2: layers that are a mixer and nothing else. No token attends to another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from baton.shared.engine.models.mamba_config import (
    HybridConfig,
    MambaConfig,
    check_inner_size,
    check_shape,
    read_step_limit,
    skip,
)
from baton.shared.engine.models.model_config import read_activation, read_ends
from baton.shared.engine.models.model_type import ModelType
from baton.shared.model_files.fields import Fields

if TYPE_CHECKING:
    from baton.shared.engine.executor import Model
    from baton.shared.engine.model_loader import ModelLoader
    from baton.shared.engine.models.blocks import Names

_MOST_TOKENS = 2**20
"""Of a sequence. The model knows no positions and has no limit of its own."""
MIXER_NAMES = {
    "input": "in_proj",
    "conv": "conv1d",
    "dt_bias": "dt_bias",
    "a_log": "A_log",
    "d": "D",
    "gated_norm": "norm",
    "mixed": "out_proj",
}
"""Within the mixer."""
NAMES = {
    "embedding": "backbone.embeddings",
    "norm": "backbone.norm_f",
    "head": "lm_head",
    "layer": "backbone.layers.{}.",
    "input_norm": "norm",
    **{name: f"mixer.{module}" for name, module in MIXER_NAMES.items()},
}
_FIRST_NAMES = {**NAMES, "embedding": "backbone.embedding"}
"""Those of the authors' own files."""


def configure(fields: Fields) -> HybridConfig:
    common = read_ends(fields)
    if common["max_position_embeddings"] is None:
        common["max_position_embeddings"] = _MOST_TOKENS
    # Between layers: here the residual is of the activations' type, whichever that is.
    fields.boolean("residual_in_fp32")
    drawn = ("time_step_rank", "time_step_min", "time_step_max", "time_step_floor")
    skip(fields, "chunk_size", "rescale_prenorm_residual", *drawn)
    num_layers = fields.integer("num_hidden_layers")
    num_heads, head_dim = fields.integer("num_heads"), fields.integer("head_dim")
    num_groups = fields.integer("n_groups")
    inner = fields.integer("expand") * common["hidden_size"]
    check_inner_size(
        fields, "head_dim", "num_heads", what="expand times hidden_size",
        inner=inner, num_heads=num_heads, head_dim=head_dim,
    )  # fmt: skip
    check_shape(fields, heads="num_heads", groups="n_groups", num_heads=num_heads,
                num_groups=num_groups)  # fmt: skip
    has_bias = fields.boolean("use_bias")
    mamba = MambaConfig(
        num_heads=num_heads,
        head_dim=head_dim,
        state_size=fields.integer("state_size"),
        num_groups=num_groups,
        conv_kernel=fields.integer("conv_kernel", least=2),
        activation=read_activation(fields, "hidden_act"),
        has_conv_bias=fields.boolean("use_conv_bias", default=True),
        has_input_bias=has_bias,
        has_output_bias=has_bias,
        **read_step_limit(fields),
    )
    return HybridConfig(
        **common,
        intermediate_size=mamba.inner_size,
        rms_norm_eps=fields.number("layer_norm_epsilon"),
        layers=(None,) * num_layers,
        states=(mamba.state_spec,) * num_layers,
        mamba=mamba,
    )


def build(config: HybridConfig, load: ModelLoader, names: Names) -> Model:
    from baton.shared.engine.models.decoder import Decoder
    from baton.shared.engine.models.mamba import HybridLayer, MambaMixer

    def make_layer(index: int) -> HybridLayer:
        prefix = names["layer"].format(index)
        return HybridLayer(
            config, load, names, index, mixer=MambaMixer(config, load, names, prefix, index)
        )

    return Decoder(config, load, names, make_layer)


MAMBA2 = ModelType("mamba2", configure, build, (NAMES, _FIRST_NAMES))
