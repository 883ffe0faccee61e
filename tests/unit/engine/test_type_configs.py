"""config.json of the types beyond llama: what layers become of it, and what is refused by name.

Values are held against transformers' own classes where these say them; test_model_types.py compares
what is computed of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.shared.engine.models import registry
from baton.shared.engine.models.model_config import LayerStyle, ModelConfig
from baton.shared.model_files.fields import ModelError

BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWED = {"use_sliding_window": True, "sliding_window": 64}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 1e4,
}
UNTIED = {"tie_word_embeddings": False}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LATENT = {"num_key_value_heads": 4, "num_experts_per_tok": 2}
Read = Callable[..., ModelConfig]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """The config of BASE as a type, with changes. Of multimodal types BASE is the text part, and
    `text_config` changes it."""

    def read(model_type: str, **changes: Any) -> ModelConfig:
        fields: dict[str, Any] = {"model_type": model_type, **BASE, **changes}
        if "text_config" in changes:
            text = {**BASE, **changes["text_config"]}
            fields = {"model_type": model_type, **changes, "text_config": text}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return registry.load_model_config(tmp_path)[1]

    return read


@pytest.mark.parametrize(
    ("model_type", "changes", "windows"),
    [
        ("qwen2", {}, [None] * 4),
        ("qwen2", {"sliding_window": 64, "max_window_layers": 0}, [None] * 4),
        ("qwen2", {"use_sliding_window": True, "max_position_embeddings": 8192}, [None] * 4),
        ("qwen2", {**WINDOWED, "max_window_layers": 3}, [None, None, None, 64]),
        ("qwen2", {**WINDOWED, "max_window_layers": 0}, [64] * 4),
        ("qwen2", {**WINDOWED, "max_window_layers": 9}, [None] * 4),
        ("qwen2", {**WINDOWED, "sliding_window": None, "max_window_layers": 0}, [None] * 4),
        # Nothing ever leaves it.
        ("qwen2", {**WINDOWED, "sliding_window": 512, "max_window_layers": 0}, [None] * 4),
        ("qwen2", {**WINDOWED, "layer_types": [SLIDING, FULL] * 2}, [64, None] * 2),
        ("qwen3", {**WINDOWED, "max_window_layers": 2}, [None, None, 64, 64]),
        ("qwen2_5_vl", {**WINDOWED, "max_window_layers": 1}, [None, 64, 64, 64]),
        ("qwen3_vl", {"text_config": {}}, [None] * 4),
        ("smollm3", {}, [None] * 4),
        ("smollm3", WINDOWED, [None, None, None, 64]),
        ("smollm3", {**WINDOWED, "no_rope_layer_interval": 2}, [None, 64] * 2),
        ("smollm3", {**WINDOWED, "no_rope_layers": [0, 0, 1, 1, 0]}, [64, 64, None, None]),
        ("smollm3", {**WINDOWED, "layer_types": [SLIDING] + [FULL] * 3}, [64, None, None, None]),
        ("smollm3", {"sliding_window": 64}, [None] * 4),
        ("phi3", {"sliding_window": 64}, [64] * 4),
        ("phi3", {"sliding_window": 262144}, [None] * 4),
        ("ministral3", {}, [None] * 4),
        ("ministral3", {"sliding_window": 64}, [64] * 4),
        ("mistral3", {"text_config": {"sliding_window": 64}}, [64] * 4),
        ("mistral3", {"text_config": {"max_position_embeddings": 8192}}, [4096] * 4),
        ("granite", {"layer_types": [FULL] * 4, "sliding_window": 64}, [None] * 4),
        ("glm4", {"sliding_window": None}, [None] * 4),
    ],
)
def test_windows(
    read: Read, model_type: str, changes: dict[str, Any], windows: list[int | None]
) -> None:
    assert [layer.window for layer in read(model_type, **changes).attentions] == windows


@pytest.mark.parametrize(
    ("changes", "with_rope"),
    [
        ({}, [True, True, True, False]),
        ({"no_rope_layer_interval": 1}, [False] * 4),
        ({"no_rope_layer_interval": 9}, [True] * 4),
        ({"no_rope_layers": [0, 1, 0, 1, 1]}, [False, True, False, True]),
    ],
)
def test_layers_without_rope(read: Read, changes: dict[str, Any], with_rope: list[bool]) -> None:
    layers = read("smollm3", **changes).attentions
    assert [layer.rope.rope_type != "none" for layer in layers] == with_rope
    assert {layer.rope.theta for layer in layers if layer.rope.rope_type != "none"} <= {2e6}


@pytest.mark.parametrize(
    ("model_type", "changes", "style"),
    [
        ("qwen2", {"attention_bias": False}, LayerStyle(qkv_bias=True)),
        ("qwen3", {}, LayerStyle(has_qk_norm=True)),
        (
            "qwen3",
            {"attention_bias": True},
            LayerStyle(has_qk_norm=True, qkv_bias=True, output_bias=True),
        ),
        ("qwen3_vl", {"text_config": {"mlp_bias": True}}, LayerStyle(has_qk_norm=True)),
        ("phi3", {"attention_bias": True}, LayerStyle()),
        ("granite", {"residual_multiplier": 0.5}, LayerStyle(residual_scale=0.5)),
        ("granite", {"mlp_bias": True}, LayerStyle(mlp_bias=True)),
        ("glm4", {}, LayerStyle(qkv_bias=True, has_post_norms=True)),
        ("glm4", {"attention_bias": False}, LayerStyle(has_post_norms=True)),
        ("ministral3", {"attention_bias": True}, LayerStyle()),
        ("qwen2_5_vl", {}, LayerStyle(qkv_bias=True)),
    ],
)
def test_what_layers_have(
    read: Read, model_type: str, changes: dict[str, Any], style: LayerStyle
) -> None:
    assert read(model_type, **changes).style == style


def test_a_granite_without_its_fields_scales_nothing_but_attention(read: Read) -> None:
    config = read("granite")
    # As its class in transformers has it; not by the size of heads.
    assert {layer.scale for layer in config.attentions} == {1.0}
    assert (config.embedding_scale, config.logits_scale) == (1, 1)
    scaled = read("granite", attention_multiplier=0.5, embedding_multiplier=12, logits_scaling=8)
    assert {layer.scale for layer in scaled.attentions} == {0.5}
    assert (scaled.embedding_scale, scaled.logits_scale) == (12, 0.125)


@pytest.mark.parametrize(
    ("model_type", "changes", "is_tied"),
    [
        ("smollm3", {}, True),
        ("qwen3", {}, False),
        ("mistral3", {"text_config": {}}, True),
        (
            "mistral3",
            {"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False},
            0,
        ),
        ("qwen3_vl", {"text_config": {"tie_word_embeddings": True}}, False),
        ("qwen3_vl", {"text_config": {}, "tie_word_embeddings": True}, True),
        ("qwen2_5_vl", {"text_config": {"tie_word_embeddings": True}}, True),
        ("qwen2_5_vl", {"tie_word_embeddings": True}, True),
    ],
)
def test_which_word_on_tying_counts(
    read: Read, model_type: str, changes: dict[str, Any], is_tied: bool
) -> None:
    assert read(model_type, **changes).tie_word_embeddings == is_tied


def test_a_text_part_is_read_wherever_it_stands(read: Read) -> None:
    nested = read("qwen2_5_vl", text_config={"model_type": "qwen2"}, eos_token_id=[3, 4])
    assert nested.layers == read("qwen2_5_vl").layers
    assert (nested.model_type, nested.eos_token_ids) == ("qwen2_5_vl", (3, 4))
    text = {"model_type": "ministral3", "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}}
    config = read("mistral3", text_config=text, dtype="bfloat16")
    assert config.attentions[0].rope.query_scale_beta == 0.1 and config.dtype == "bfloat16"
    assert read("mistral3", text_config={"dtype": "float16"}).dtype == "float16"


@pytest.mark.parametrize(
    ("model_type", "changes", "field"),
    [
        (
            "qwen2",
            {"layer_types": [SLIDING] * 4},
            "layer_types: sliding_attention, but",
        ),
        ("qwen2", {**WINDOWED, "layer_types": [FULL] * 3}, "layer_types: has 3 entries for 4"),
        ("qwen2", {**WINDOWED, "layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ("qwen2", {**WINDOWED, "sliding_window": 0}, "sliding_window"),
        ("qwen2", {**WINDOWED, "max_window_layers": -1}, "max_window_layers: must be at least 0"),
        ("qwen2", {"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide 4"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act"),
        ("qwen3", {"use_sliding_window": "yes"}, "use_sliding_window"),
        ("qwen3", {"head_dim": 15}, "head_dim"),
        ("qwen3", {"hidden_act": "relu"}, "hidden_act"),
        ("granite", {"attention_multiplier": 0}, "attention_multiplier"),
        ("granite", {"logits_scaling": "8"}, "logits_scaling"),
        ("granite", {"sliding_window": 64}, "sliding_window: a granite has none"),
        ("granite", {"layer_types": [SLIDING] * 4}, "layer_types: a granite has no layers but"),
        ("glm4", {"hidden_act": "gelu"}, "hidden_act"),
        ("glm4", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        (
            "phi3",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling.rope_type: must be one of default, longrope, not",
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", **FACTORS, "long_factor": [1.0] * 7}},
            "rope_scaling: long_factor has 7 entries",
        ),
        ("phi3", {"layer_types": [FULL, SLIDING] * 2}, "layer_types: a phi3's layers are all"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers: has 2 entries for 4"),
        ("smollm3", {"no_rope_layers": [1, 0, 2, 1]}, "no_rope_layers: entries must be 0 or 1"),
        ("smollm3", {"no_rope_layers": [True] * 4}, "no_rope_layers: must be a list of integers"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ("smollm3", {"layer_types": [SLIDING] * 4}, "layer_types: sliding_attention, but"),
        ("ministral3", {"rope_parameters": YARN}, "rope_parameters.llama_4_scaling_beta: missing"),
        ("ministral3", {"layer_types": [SLIDING] * 4}, "layer_types"),
        ("mistral3", {}, "text_config: missing"),
        ("mistral3", {"text_config": {"model_type": "llama"}}, "text_config.model_type: only"),
        ("mistral3", {"text_config": {"hidden_act": "gelu"}}, "text_config.hidden_act"),
        ("mistral3", {"text_config": {"head_dim": 7}}, "text_config.head_dim"),
        ("mistral3", {"text_config": {}, "quantization_config": {"quant_method": "bnb"}}, "bnb"),
        ("qwen3_vl", {}, "text_config: missing"),
        ("qwen3_vl", {"text_config": {"sliding_window": 64}}, "text_config.sliding_window"),
        ("qwen2_5_vl", {"text_config": {"num_hidden_layers": 0}}, "text_config.num_hidden_layers"),
        (
            "qwen2_5_vl",
            {"text_config": {"rope_scaling": {"type": "longrope"}}},
            "text_config.rope_scaling.short_factor",
        ),
        ("deepseek_v3", {}, "num_key_value_heads: only 4 is supported, not 2"),
        ("deepseek_v3", {**LATENT, "qk_rope_head_dim": 7}, "qk_rope_head_dim: rotary"),
        ("deepseek_v3", {**LATENT, "kv_lora_rank": 0}, "kv_lora_rank: must be at least 1"),
        ("deepseek_v3", {**LATENT, "scoring_func": "softmax"}, "scoring_func: only"),
        ("deepseek_v3", {**LATENT, "topk_method": "greedy"}, "topk_method: only"),
        ("deepseek_v3", {**LATENT, "moe_layer_freq": 2}, "moe_layer_freq: only 1"),
        ("deepseek_v3", {**LATENT, "hidden_act": "gelu"}, "hidden_act"),
        ("deepseek_v3", {**LATENT, "n_group": 256}, "n_group: groups of 1; "),
        (
            "deepseek_v3",
            {**LATENT, "rope_scaling": {"type": "dynamic", "factor": 0, "mscale_all_dim": 1.0}},
            "rope_scaling.factor",
        ),
        ("deepseek_v2", {**LATENT, "topk_method": "noaux_tc"}, "topk_method: only"),
        ("deepseek_v2", {"num_key_value_heads": 4}, "num_experts_per_tok: missing"),
        (
            "deepseek_v2",
            {**LATENT, "topk_method": "group_limited_greedy"},
            "n_group: missing",
        ),
        ("kimi_k2", {**LATENT, "scoring_func": "softmax"}, "scoring_func: only"),
        ("glm4_moe_lite", {**LATENT, "mlp_layer_types": ["sparse"]}, "mlp_layer_types: has 1"),
        ("glm4_moe_lite", {**LATENT, "mlp_layer_types": ["moe"] * 4}, 'mlp_layer_types: "moe"'),
        ("glm4_moe_lite", {**LATENT, "first_k_dense_replace": 2}, "first_k_dense_replace: 2 con"),
        ("qwen3_next", {"layer_types": [FULL]}, "layer_types: has 1 entries for 4 hidden layers"),
        ("qwen3_next", {"layer_types": [SLIDING] * 4}, 'layer_types: "sliding_attention"'),
        ("qwen3_next", {"linear_num_key_heads": 3}, "linear_num_value_heads: 32 is no multiple"),
        ("qwen3_next", {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim: must be at least 2"),
        ("qwen3_next", {"linear_key_head_dim": 0}, "linear_key_head_dim: must be at least 1"),
        ("qwen3_next", {"num_experts": 0}, "num_experts: must be at least 1"),
        ("qwen3_next", {"hidden_act": "gelu"}, "hidden_act: only"),
        ("qwen3_next", {"attn_output_gate": False}, "attn_output_gate: only true"),
        ("qwen3_next", {"full_attention_interval": 0}, "full_attention_interval: must be at"),
        ("qwen3_5", {}, "text_config: missing"),
        ("qwen3_5", {"text_config": {"head_dim": 7}}, "text_config.head_dim"),
        (
            "qwen3_5",
            {"text_config": {"rope_parameters": {"mrope_section": [11, 11, 10, 1]}}},
            "text_config.rope_parameters.mrope_section",
        ),
        ("qwen3_5_moe", {"text_config": {"num_experts_per_tok": 257}}, "257 of 256 experts"),
    ],
)
def test_what_is_refused(
    read: Read, model_type: str, changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        read(model_type, **changes)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: ") and field in message
    assert "\n" not in message
