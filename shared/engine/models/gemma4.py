"""Gemma 4, the text model: full layers with heads of another size, norms of values, upper layers
that read the keys and values of lower ones, inputs of each token for every layer, and mixtures of
experts beside the MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from baton.kernels.routing import RoutingRule
from baton.shared.engine.models import gemma3
from baton.shared.engine.models.mixture_config import MixtureConfig, read_top_k
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    LayerStyle,
    ModelConfig,
    read_activation,
    read_cap,
    read_decoder,
    read_head_dim,
    read_heads,
    read_kv_heads,
    read_layer_types,
)
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.models.multimodal import text_part_of
from baton.shared.engine.models.rope_fields import RopeRules, read_ropes
from baton.shared.engine.models.windows import every_nth_full, read_window_of
from baton.shared.model_files.fields import Fields, shown

if TYPE_CHECKING:
    from baton.shared.engine.executor import Model
    from baton.shared.engine.model_loader import ModelLoader
    from baton.shared.engine.models.blocks import Names

NAMES = {
    **gemma3.NAMES,
    "layer_scalar": "layer_scalar",
    "extra_gate": "per_layer_input_gate",
    "extra_output": "per_layer_projection",
    "extra_norm": "post_per_layer_input_norm",
    "extra_embedding": "model.embed_tokens_per_layer",
    "extra_projection": "model.per_layer_model_projection",
    "extra_projection_norm": "model.per_layer_projection_norm",
    "router": "router.proj",
    "router_norm": "router.scale",
    "expert_scale": "router.per_expert_scale",
    "fused_gate_up": "experts.gate_up_proj",
    "fused_down": "experts.down_proj",
    "mixture_norm": "pre_feedforward_layernorm_2",
    "mixture_post_norm": "post_feedforward_layernorm_2",
    "beside_mixture_norm": "post_feedforward_layernorm_1",
}
_FULL_EVERY = 6
_ROPES = {
    "sliding_attention": RopeRules(default={"rope_type": "default", "rope_theta": 10000.0}),
    "full_attention": RopeRules(
        default={
            "rope_type": "proportional",
            "rope_theta": 1000000.0,
            "partial_rotary_factor": 0.25,
        }
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma4Config(ModelConfig):
    """The two tuples are by layer."""

    keys_are_values: tuple[bool, ...]
    """Values are what keys are before norm and rotation."""
    intermediate_sizes: tuple[int, ...]
    extra_size: int
    """Numbers that each layer gets of a token beside its input; 0: it gets none."""
    extra_vocab_size: int
    """Tokens in the table of these."""


def configure(fields: Fields) -> ModelConfig:
    # Of text alone, "vision" changes nothing.
    fields.only("use_bidirectional_attention", "vision")
    common = read_decoder(fields, reads_itself=("per_layer_config",))
    max_position = common["max_position_embeddings"]
    types = _layer_types(fields)
    heads_of = _heads_by_type(fields, types)
    window = read_window_of(fields, types, max_position)
    by_type = {
        kind: AttentionConfig(
            **heads_of[kind],
            rope=rope,
            window=window if kind == "sliding_attention" else None,
            scale=1.0,
        )
        for kind, rope in read_ropes(fields, max_position, _ROPES).items()
    }
    sources = _sources(fields, types)
    is_wide = fields.boolean("use_double_wide_mlp")
    size = common["intermediate_size"]
    keys_are_values = fields.boolean("attention_k_eq_v")
    return Gemma4Config(
        **common,
        layers=tuple(
            replace(by_type[each], source=source)
            for each, source in zip(types, sources, strict=True)
        ),
        style=_style(fields),
        embedding_scale=common["hidden_size"] ** 0.5,
        logits_soft_cap=read_cap(fields, "final_logit_softcapping"),
        keys_are_values=tuple(keys_are_values and each == "full_attention" for each in types),
        intermediate_sizes=tuple(
            2 * size if is_wide and source is not None else size for source in sources
        ),
        extra_size=fields.integer("hidden_size_per_layer_input", least=0),
        extra_vocab_size=_extra_vocab_size(fields, common["vocab_size"]),
        mixture=_read_mixture(fields, len(types)),
    )


def _read_mixture(fields: Fields, num_layers: int) -> MixtureConfig | None:
    """In every layer, if any."""
    if not fields.boolean("enable_moe_block"):
        return None
    num_experts = fields.integer("num_experts")
    return MixtureConfig(
        routing=RoutingRule(
            num_experts=num_experts,
            top_k=read_top_k(fields, num_experts, "top_k_experts"),
            is_normalised=True,
        ),
        expert_size=fields.integer("moe_intermediate_size"),
        layers=(True,) * num_layers,
        activation=read_activation(fields, "hidden_activation"),
    )


def _style(fields: Fields) -> LayerStyle:
    has_bias = fields.boolean("attention_bias")
    return LayerStyle(
        qkv_bias=has_bias,
        output_bias=has_bias,
        activation=read_activation(fields, "hidden_activation"),
        has_qk_norm=True,
        has_value_norm=True,
        has_post_norms=True,
        has_wide_norms=True,
    )


def _layer_types(fields: Fields) -> list[str]:
    num_layers = fields.integer("num_hidden_layers")
    types = read_layer_types(fields, num_layers) or every_nth_full(_FULL_EVERY, num_layers)
    # transformers makes it so whatever the file says.
    return [*types[:-1], "full_attention"]


def _sources(fields: Fields, types: Sequence[str]) -> list[int | None]:
    """By layer: the one below whose keys and values it reads; None: it has its own."""
    name = "num_kv_shared_layers"
    num_shared = fields.integer(name, least=0)
    first = len(types) - num_shared
    if first < 1:
        raise fields.error(name, f"{num_shared} of {len(types)} layers leave none to read from")
    last_of = {each: index for index, each in enumerate(types[:first])}
    for index, each in enumerate(types):
        if each not in last_of:
            raise fields.error(
                name, f"{num_shared}: layer {index} is of {each}, and no layer below {first} is"
            )
    return [None if index < first else last_of[each] for index, each in enumerate(types)]


def _heads_by_type(fields: Fields, types: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What `read_heads` gives, by type of layer."""
    heads = read_heads(fields, fields.integer("hidden_size"))
    if fields.has("per_layer_config"):
        return _listed_heads(fields, types, heads)
    full = {**heads, "head_dim": read_head_dim(fields, "global_head_dim", default=512)}
    if fields.boolean("attention_k_eq_v") and fields.get("num_global_key_value_heads") is not None:
        full["num_kv_heads"] = read_kv_heads(
            fields, heads["num_heads"], "num_global_key_value_heads"
        )
    return {"sliding_attention": heads, "full_attention": full}


def _listed_heads(
    fields: Fields, types: Sequence[str], heads: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Of a file that says for some layers what is not as in the others: transformers writes such.
    Layers of one type are alike."""
    name = "per_layer_config"
    by_layer = [heads] * len(types)
    for key, own in fields.objects(name).items():
        if not key.isdecimal() or int(key) >= len(types):
            raise fields.error(name, f"{shown(key)} is no number of a layer")
        changed = dict(heads)
        if own.get("head_dim") is not None:
            changed["head_dim"] = read_head_dim(own)
        if own.get("num_key_value_heads") is not None:
            changed["num_kv_heads"] = read_kv_heads(own, heads["num_heads"])
        for other in own.unread():
            raise fields.error(name, f"{other}: only the heads may differ by layer")
        by_layer[int(key)] = changed
    heads_of = {"sliding_attention": heads, "full_attention": heads}
    heads_of.update(zip(types, by_layer, strict=True))
    for index, each in enumerate(types):
        if by_layer[index] != heads_of[each]:
            raise fields.error(name, f"the heads of layer {index} are not those of all {each}")
    return heads_of


def _extra_vocab_size(fields: Fields, vocab_size: int) -> int:
    name = "vocab_size_per_layer_input"
    size = fields.integer(name)
    if size < vocab_size and fields.integer("hidden_size_per_layer_input", least=0):
        raise fields.error(name, f"{size} is less than vocab_size {vocab_size}")
    return size


def build(config: Gemma4Config, load: ModelLoader, names: Names) -> Model:
    from baton.shared.engine.models import gemma4_layers

    return gemma4_layers.build(config, load, names)


_UNUSED = tuple(
    f"self_attn.{module}.{kind}"
    for module in ("k_proj", "v_proj", "k_norm", "v_norm")
    for kind in ("weight", "bias", "weight_scale")
)
"""What files may hold of layers that read the keys and values of others."""

GEMMA4_TEXT = ModelType("gemma4_text", configure, build, (NAMES,), _UNUSED)
GEMMA4 = text_part_of(
    "gemma4",
    [GEMMA4_TEXT],
    ignored_modules=["vision_tower", "audio_tower", "embed_vision", "embed_audio"],
)
