"""A model type for tests of the kernels: all options that operations have, in four layers.

Windows and full attention with heads of two sizes, soft caps, sinks, norms of heads in float32,
norms behind attention and MLP, gelu, scales, queries scaled by position, two layers that read the
others' keys and values, and beside each MLP a mixture of experts.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from baton.kernels.routing import ClampedSwiglu, RoutingRule
from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.models import llama
from baton.shared.engine.models.blocks import Names
from baton.shared.engine.models.decoder import Decoder
from baton.shared.engine.models.layers import SandwichLayer
from baton.shared.engine.models.mixture import Mixture
from baton.shared.engine.models.mixture_config import MixtureConfig
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    LayerStyle,
    ModelConfig,
    read_decoder,
)
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.models.rope_config import RopeConfig
from baton.shared.model_files.fields import Fields
from tests.weights import weight_shapes

WINDOW = 9
CONFIG: dict[str, Any] = {
    "model_type": "test_every_option",
    "vocab_size": 83,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "max_position_embeddings": 320,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
NAMES = {
    **llama.NAMES,
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "attention_post_norm": "attention_post_norm",
    "mlp_post_norm": "mlp_post_norm",
    "sinks": "self_attn.sinks",
    "router": "router",
    "choice_bias": "router.choice",
    "expert_scale": "router.scale",
    "fused_gate_up": "experts.gate_up",
    "fused_down": "experts.down",
    "shared_gate": "shared.sigmoid",
    **{f"shared_mlp_{name}": f"shared.{name}" for name in ("gate", "up", "down")},
}
_MIXTURE = MixtureConfig(
    routing=RoutingRule(
        num_experts=6,
        top_k=2,
        scoring="sigmoid",
        is_normalised=True,
        scale=1.5,
        num_groups=3,
        top_groups=2,
    ),
    expert_size=20,
    layers=(True,) * 4,
    activation=ClampedSwiglu(1.702, 2.0),
    has_bias=True,
    alternates=True,
    has_choice_bias=True,
    shared_size=16,
    has_shared_gate=True,
)
_ROPE = RopeConfig(
    theta=10000.0, rope_type="default", original_max_position=16, query_scale_beta=0.3
)


def configure(fields: Fields) -> ModelConfig:
    def layer(head_dim: int, num_kv_heads: int, **options: Any) -> AttentionConfig:
        return AttentionConfig(4, num_kv_heads, head_dim, _ROPE, scale=0.2, **options)

    return ModelConfig(
        **read_decoder(fields),
        layers=(
            layer(24, 2, window=WINDOW, soft_cap=3.0),
            layer(40, 1),
            layer(24, 2, window=WINDOW, soft_cap=3.0, source=0),
            layer(40, 1, source=1),
        ),
        style=LayerStyle(
            qkv_bias=True,
            activation="gelu_tanh",
            residual_scale=0.7,
            has_qk_norm=True,
            has_post_norms=True,
            has_value_norm=True,
            has_wide_norms=True,
            norm_plus_one=True,
            has_sinks=True,
        ),
        mixture=_MIXTURE,
        embedding_scale=6.9,
        logits_scale=1.5,
        logits_soft_cap=20.0,
    )


class Layer(SandwichLayer):
    def __init__(self, config: ModelConfig, load: ModelLoader, names: Names, index: int) -> None:
        super().__init__(config, load, names, index)
        mixture = Mixture(config, _MIXTURE, load, names, names["layer"].format(index))
        self._beside_mlp = lambda hidden, added: mixture(hidden, self._mlp_norm, added)


def build(config: ModelConfig, load: ModelLoader, names: Names) -> Decoder:
    return Decoder(config, load, names, partial(Layer, config, load, names))


EVERY_OPTION = ModelType("test_every_option", configure, build, (NAMES,))


def write_model(directory: Path) -> None:
    """Random weights whose logits are far apart."""
    (directory / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: torch.randn(shape, generator=generator) * 0.3
        for name, shape in weight_shapes(directory).items()
    }
    save_file(weights, directory / "model.safetensors")
