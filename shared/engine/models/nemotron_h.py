"""Nemotron-H: every layer is one thing behind a norm, a mixer of Mamba2, an attention that knows no
positions, an MLP without a gate, or a mixture of such; a pattern says which."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from baton.shared.engine.models.mamba2 import MIXER_NAMES
from baton.shared.engine.models.mamba_config import (
    ATTENTION,
    MAMBA,
    MIXTURE,
    MLP,
    HybridConfig,
    MambaConfig,
    check_num_layers,
    check_shape,
    read_kinds,
    read_state_dtype,
    skip,
)
from baton.shared.engine.models.mixture_config import read_sigmoid_mixture
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    LayerStyle,
    read_activation,
    read_ends,
    read_head_dim,
    read_kv_heads,
)
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.models.rope_config import NO_ROPE
from baton.shared.model_files.fields import Fields, shown

if TYPE_CHECKING:
    from baton.shared.engine.executor import Model
    from baton.shared.engine.model_loader import ModelLoader
    from baton.shared.engine.models.blocks import Names

_NAMES = {
    "head": "lm_head",
    "input_norm": "norm",
    **{name: f"mixer.{module}" for name, module in MIXER_NAMES.items()},
    "q": "mixer.q_proj",
    "k": "mixer.k_proj",
    "v": "mixer.v_proj",
    "output": "mixer.o_proj",
    "up": "mixer.up_proj",
    "down": "mixer.down_proj",
    "router": "mixer.gate",
    "choice_bias": "mixer.gate.e_score_correction_bias",
    "expert_up": "mixer.experts.{}.up_proj",
    "expert_down": "mixer.experts.{}.down_proj",
    "fused_gate_up": "mixer.experts.up_proj",
    "fused_down": "mixer.experts.down_proj",
    "shared_up": "mixer.shared_experts.up_proj",
    "shared_down": "mixer.shared_experts.down_proj",
    "to_latent": "mixer.fc1_latent_proj",
    "of_latent": "mixer.fc2_latent_proj",
}
NAMES = tuple(
    {
        **_NAMES,
        "embedding": f"{root}.embeddings",
        "norm": f"{root}.norm_f",
        "layer": f"{root}.layers.{{}}.",
    }
    for root in ("backbone", "model")
)
_KINDS = {"M": MAMBA, "*": ATTENTION, "-": MLP, "E": MIXTURE}
"""Letters of a pattern."""
_OLD_NAMES = {
    "n_groups": "mamba_n_groups",
    "conv_kernel": "mamba_d_conv",
    "time_step_min": "mamba_dt_min",
    "use_conv_bias": "mamba_conv_bias",
}


_SAYING_NOTHING = (
    *("attention_bias", "chunk_size", "expand", "hidden_dropout", "mamba_proj_bias"),
    *("moe_shared_expert_overlap", "mtp_layers_block_type", "num_logits_to_keep"),
    *("num_nextn_predict_layers", "rescale_prenorm_residual", "residual_in_fp32"),
    *("time_step_floor", "time_step_limit", "time_step_max", "use_mamba_kernels"),
)
"""What transformers writes, and its code does not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NemotronHConfig(HybridConfig):
    kinds: tuple[str, ...]
    """By layer."""
    shared_size: int
    """Of the MLP beside a mixture."""
    latent_size: int | None
    """Experts take and give vectors of this size, which are made of hidden states, and these of
    them; None: hidden states."""


def configure(fields: Fields) -> NemotronHConfig:
    for new, old in _OLD_NAMES.items():
        if fields.get(old) is not None:
            fields.assume({new: fields.get(old)})
            fields.only(new, fields.get(old), because=f"{old} is {shown(fields.get(old))}")
    common = read_ends(fields)
    # transformers ties nothing, whatever the file says.
    fields.only("tie_word_embeddings", False)
    fields.only("mlp_hidden_act", "relu2")
    skip(fields, *_SAYING_NOTHING)
    kinds = _read_kinds(fields)
    num_heads = fields.integer("num_attention_heads")
    attention = AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=read_kv_heads(fields, num_heads),
        head_dim=read_head_dim(fields),
        rope=NO_ROPE,
    )
    mamba = _read_mamba(fields)
    latent_size = None
    if fields.get("moe_latent_size") is not None:
        latent_size = fields.integer("moe_latent_size")
    mixture = None
    if MIXTURE in kinds:
        of_layers = tuple(kind == MIXTURE for kind in kinds)
        mixture = read_sigmoid_mixture(fields, of_layers)
        mixture = replace(mixture, shared_size=0, activation="relu2", input_size=latent_size)
    return NemotronHConfig(
        **common,
        intermediate_size=fields.integer("intermediate_size"),
        rms_norm_eps=fields.number("layer_norm_epsilon"),
        layers=tuple(attention if kind == ATTENTION else None for kind in kinds),
        states=tuple(mamba.state_spec if kind == MAMBA else None for kind in kinds),
        style=LayerStyle(mlp_bias=fields.boolean("mlp_bias"), has_wide_norms=True),
        mixture=mixture,
        mamba=mamba,
        kinds=tuple(kinds),
        shared_size=fields.integer("moe_shared_expert_intermediate_size"),
        latent_size=latent_size,
    )


def _read_kinds(fields: Fields) -> list[str]:
    """By list or by pattern, which must say the same; neither is the class's own four layers."""
    kinds = list(_KINDS.values())
    lists = {name: read_kinds(fields, name, kinds) for name in ("layers_block_type", "layer_types")}
    found = {name: given for name, given in lists.items() if given is not None}
    pattern = fields.get("hybrid_override_pattern")
    if pattern is not None:
        name = "hybrid_override_pattern"
        letters = fields.string(name)
        for letter in letters:
            if letter not in _KINDS:
                raise fields.error(name, f"{shown(letter)} is not one of {', '.join(_KINDS)}")
        if not letters:
            raise fields.error(name, "names no layer")
        found[name] = [_KINDS[letter] for letter in letters]
    if not found:
        found["layers_block_type"] = [MAMBA, MIXTURE, ATTENTION, MLP]
    (first, given), *others = found.items()
    for name, other in others:
        if other != given:
            raise fields.error(name, f"contradicts {first}, which has {len(given)} entries")
    check_num_layers(fields, first, given)
    if MAMBA not in given and ATTENTION not in given:
        raise fields.error(first, "no layer knows of other tokens")
    return given


def _read_mamba(fields: Fields) -> MambaConfig:
    num_heads, num_groups = fields.integer("mamba_num_heads"), fields.integer("n_groups")
    check_shape(fields, heads="mamba_num_heads", groups="n_groups", num_heads=num_heads,
                num_groups=num_groups)  # fmt: skip
    has_bias = fields.boolean("use_bias")
    return MambaConfig(
        num_heads=num_heads,
        head_dim=fields.integer("mamba_head_dim"),
        state_size=fields.integer("ssm_state_size"),
        num_groups=num_groups,
        conv_kernel=fields.integer("conv_kernel", least=2),
        activation=read_activation(fields, "mamba_hidden_act"),
        has_conv_bias=fields.boolean("use_conv_bias", default=True),
        has_input_bias=has_bias,
        has_output_bias=has_bias,
        # Of the limits that files give, this is the one that transformers takes.
        dt_min=fields.number("time_step_min"),
        state_dtype=read_state_dtype(fields),
    )


def build(config: NemotronHConfig, load: ModelLoader, names: Names) -> Model:
    from baton.shared.engine.models.blocks import Attention
    from baton.shared.engine.models.decoder import Decoder
    from baton.shared.engine.models.mamba import HybridLayer, MambaMixer, UngatedMlp
    from baton.shared.engine.models.ungated_mixture import UngatedMixture

    def make_layer(index: int) -> HybridLayer:
        prefix, kind = names["layer"].format(index), config.kinds[index]
        parts: dict[str, Any] = {}
        if kind == MAMBA:
            parts["mixer"] = MambaMixer(config, load, names, prefix, index)
        elif kind == ATTENTION:
            parts["mixer"] = Attention(config, load, names, prefix, index)
        elif kind == MLP:
            parts["mlp"] = UngatedMlp(config, load, names, prefix, config.intermediate_size)
        else:
            parts["mlp"] = UngatedMixture(config, load, names, prefix)
        return HybridLayer(config, load, names, index, **parts)

    return Decoder(config, load, names, make_layer)


NEMOTRON_H = ModelType("nemotron_h", configure, build, NAMES, ignored_modules=("mtp.",))
