"""A model type for tests alone: a llama of which some layers see only a window of positions, and
may have other heads than the rest, so that blocks of the two cache groups differ in bytes.

config.json: llama's fields, `layer_types`, `sliding_window`, and for the windowed layers
`sliding_num_key_value_heads` and `sliding_head_dim`; where those are missing, as in the others.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from baton.shared.engine.models import decoder, registry
from baton.shared.engine.models.llama import NAMES
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    ModelConfig,
    read_decoder,
    read_heads,
    read_layer_types,
)
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.models.rope_fields import read_rope
from baton.shared.model_files.fields import Fields


def configure(fields: Fields) -> ModelConfig:
    common = read_decoder(fields)
    full = AttentionConfig(
        **read_heads(fields, common["hidden_size"]),
        rope=read_rope(fields, common["max_position_embeddings"]),
    )
    sliding = replace(
        full,
        num_kv_heads=fields.integer("sliding_num_key_value_heads", default=full.num_kv_heads),
        head_dim=fields.integer("sliding_head_dim", default=full.head_dim),
        window=fields.integer("sliding_window"),
    )
    types = read_layer_types(fields, fields.integer("num_hidden_layers"))
    if types is None:
        raise fields.error("layer_types", "missing")
    return ModelConfig(
        **common,
        layers=tuple(sliding if each == "sliding_attention" else full for each in types),
    )


ALTERNATING = ModelType("test_alternating", configure, decoder.build, (NAMES,))


def register() -> None:
    registry.register(ALTERNATING)


class _WindowedAttention(LlamaAttention):
    """A llama's attention with rope and mask of its own."""

    def __init__(self, config: Any, layer_idx: int, window: int) -> None:
        super().__init__(config, layer_idx)
        self.rotary = LlamaRotaryEmbedding(config)
        self.window = window

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, **others: Any
    ) -> Any:
        positions = others["position_ids"]
        ahead = positions[0, :, None] - torch.arange(int(positions.max()) + 1)
        seen = (ahead >= 0) & (ahead < self.window)
        mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
        rope = self.rotary(hidden_states, positions)
        return super().forward(hidden_states, rope, mask[None, None], **others)


def make_alternating(model_dir: Path, fields: dict[str, Any], *, std: float = 0.35) -> Any:
    """Writes a random model of this type → the same in transformers, float32 and eager.

    Args:
        fields: of config.json.
    """
    fields = {**fields, "attn_implementation": "eager"}
    types = fields.pop("layer_types")
    window = fields.pop("sliding_window")
    own = {
        "num_key_value_heads": fields.pop("sliding_num_key_value_heads", None),
        "head_dim": fields.pop("sliding_head_dim", None),
    }
    config: Any = LlamaConfig(**fields)
    torch.manual_seed(7)
    model: Any = LlamaForCausalLM(config)
    of_windows = LlamaConfig(**{**fields, **{k: v for k, v in own.items() if v is not None}})
    of_windows._attn_implementation = "eager"
    for index, each in enumerate(types):
        if each == "sliding_attention":
            attention = _WindowedAttention(of_windows, index, window)
            model.model.layers[index].self_attn = attention
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = nn.init.uniform_ if "norm" in name else nn.init.normal_
            draw(parameter, *((0.5, 1.5) if "norm" in name else (0.0, std)))
    model.generation_config.eos_token_id = None
    model.save_pretrained(model_dir)
    path = model_dir / "config.json"
    changes = {
        "model_type": ALTERNATING.name,
        "layer_types": types,
        "sliding_window": window,
        "sliding_num_key_value_heads": of_windows.num_key_value_heads,
        "sliding_head_dim": of_windows.head_dim,
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return model
