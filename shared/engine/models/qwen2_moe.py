"""Qwen2 with mixtures of experts, beside which every token has one more expert with a gate of its
own."""

from __future__ import annotations

from dataclasses import replace

from baton.shared.engine.models import llama, qwen3_moe
from baton.shared.engine.models.mixture_config import MixtureConfig, read_sparse_layers
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    LayerStyle,
    ModelConfig,
    read_decoder,
    read_heads,
)
from baton.shared.engine.models.model_type import ModelType, build_decoder
from baton.shared.engine.models.rope_fields import read_rope
from baton.shared.engine.models.windows import read_windows
from baton.shared.model_files.fields import Fields

NAMES = {
    **llama.NAMES,
    **qwen3_moe.EXPERT_NAMES,
    "shared_gate": "mlp.shared_expert_gate",
    "shared_mlp_gate": "mlp.shared_expert.gate_proj",
    "shared_mlp_up": "mlp.shared_expert.up_proj",
    "shared_mlp_down": "mlp.shared_expert.down_proj",
}


def configure(fields: Fields) -> ModelConfig:
    common = read_decoder(fields)
    fields.only("hidden_act", "silu", "swish")
    num_layers, max_position = (
        fields.integer("num_hidden_layers"),
        common["max_position_embeddings"],
    )
    attention = AttentionConfig(
        **read_heads(fields, common["hidden_size"]), rope=read_rope(fields, max_position)
    )
    # Every other one of the lower layers, where no list says which.
    below = fields.integer("max_window_layers", default=num_layers, least=0)
    is_sliding = [index % 2 == 0 and index < below for index in range(num_layers)]
    return ModelConfig(
        **common,
        layers=tuple(
            replace(attention, window=window)
            for window in read_windows(fields, is_sliding, max_position)
        ),
        style=LayerStyle(qkv_bias=fields.boolean("qkv_bias", default=True)),
        mixture=MixtureConfig(
            routing=qwen3_moe.read_routing(fields),
            expert_size=fields.integer("moe_intermediate_size"),
            layers=read_sparse_layers(fields, num_layers),
            shared_size=fields.integer("shared_expert_intermediate_size"),
            has_shared_gate=True,
        ),
    )


QWEN2_MOE = ModelType("qwen2_moe", configure, build_decoder, (NAMES,))
