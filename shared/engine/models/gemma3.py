"""Gemma 3, the text model: a gemma 2 with norms of queries and keys, without caps of scores, five
layers of six with a window, and a rope for either kind."""

from __future__ import annotations

from dataclasses import replace

from baton.shared.engine.models import gemma2
from baton.shared.engine.models.gemma2 import read_style
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    ModelConfig,
    read_cap,
    read_decoder,
    read_heads,
    read_layer_types,
)
from baton.shared.engine.models.model_type import ModelType, build_decoder
from baton.shared.engine.models.multimodal import text_part_of
from baton.shared.engine.models.rope_fields import RopeRules, read_ropes
from baton.shared.engine.models.windows import every_nth_full, read_window_of
from baton.shared.model_files.fields import Fields

NAMES = {**gemma2.NAMES, "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_FULL_EVERY = 6
_ROPES = {
    "full_attention": RopeRules(theta=1000000.0),
    "sliding_attention": RopeRules(theta=10000.0),
}


def configure(fields: Fields) -> ModelConfig:
    fields.only("use_bidirectional_attention", False)
    common = read_decoder(fields)
    max_position = common["max_position_embeddings"]
    types = _layer_types(fields)
    window = read_window_of(fields, types, max_position)
    heads = read_heads(fields, common["hidden_size"])
    scale = fields.number("query_pre_attn_scalar") ** -0.5
    by_type = {
        kind: AttentionConfig(
            **heads,
            rope=rope,
            window=window if kind == "sliding_attention" else None,
            scale=scale,
        )
        for kind, rope in read_ropes(fields, max_position, _ROPES).items()
    }
    return ModelConfig(
        **common,
        layers=tuple(by_type[each] for each in types),
        style=replace(read_style(fields), has_qk_norm=True),
        embedding_scale=common["hidden_size"] ** 0.5,
        logits_soft_cap=read_cap(fields, "final_logit_softcapping"),
    )


def _layer_types(fields: Fields) -> list[str]:
    num_layers = fields.integer("num_hidden_layers")
    listed = read_layer_types(fields, num_layers)
    # What transformers writes of it beside the list, and does not read.
    fields.get("_sliding_window_pattern")
    name = "sliding_window_pattern"
    if listed is not None and fields.get(name) is None:
        return listed
    types = every_nth_full(fields.integer(name, default=_FULL_EVERY), num_layers)
    if listed is not None and listed != types:
        raise fields.error(name, f"{fields.get(name)} contradicts layer_types")
    return types


GEMMA3_TEXT = ModelType("gemma3_text", configure, build_decoder, (NAMES,))
GEMMA3 = text_part_of(
    "gemma3", [GEMMA3_TEXT], ignored_modules=["vision_tower", "multi_modal_projector"]
)
