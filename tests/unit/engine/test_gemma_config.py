"""config.json of gemmas: what it means, what it leaves out, and what is refused in one line."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from baton.shared.engine.models import registry
from baton.shared.engine.models.gemma4 import Gemma4Config
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.kv.cache_spec import Full, Sliding, cache_groups
from baton.shared.model_files.fields import ModelError

FULL, SLIDING = "full_attention", "sliding_attention"
Read = Callable[..., ModelConfig]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read(model_type: str, **fields: Any) -> ModelConfig:
        values = {"model_type": model_type, **fields}
        (tmp_path / "config.json").write_text(json.dumps(values))
        _, config = registry.load_model_config(tmp_path)
        return config

    return read


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.window for layer in config.attentions]


def test_a_file_that_says_nothing_is_as_the_class_in_transformers(read: Read) -> None:
    config = read("gemma2")
    assert windows(config) == [4096, None] * 13
    [layer] = {layer for layer in config.attentions if layer.window is None}
    assert (layer.num_heads, layer.num_kv_heads, layer.head_dim) == (8, 4, 256)
    assert (layer.scale, layer.soft_cap, config.logits_soft_cap) == (1 / 16, 50.0, 30.0)
    assert (config.embedding_scale, config.tie_word_embeddings) == (48.0, True)
    assert (config.eos_token_ids, config.bos_token_id, config.vocab_size) == ((1,), 2, 256000)

    config = read("gemma3_text")
    assert windows(config) == [None if i % 6 == 5 else 4096 for i in range(26)]
    assert {layer.rope.theta for layer in config.attentions if layer.window} == {1e4}
    assert {layer.rope.theta for layer in config.attentions if not layer.window} == {1e6}
    assert {layer.soft_cap for layer in config.attentions} | {config.logits_soft_cap} == {0.0}

    config = read("gemma4_text")
    assert isinstance(config, Gemma4Config)
    assert windows(config) == [None if i % 6 == 5 else 512 for i in range(30)]
    assert {
        (layer.num_kv_heads, layer.head_dim) for layer in config.attentions if layer.window
    } == {(4, 256)}
    [full] = {layer for layer in config.attentions if not layer.window}
    assert (full.num_kv_heads, full.head_dim, full.scale) == (4, 512, 1.0)
    assert (full.rope.rope_type, full.rope.partial_rotary_factor) == ("proportional", 0.25)
    assert (config.extra_size, config.extra_vocab_size) == (256, 262144)


def test_a_gemma3_as_it_is_published_says_little(read: Read) -> None:
    """The language model's class stands for the vocabulary and the heads."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 1024,
    }
    config = read(
        "gemma3", text_config=text, vision_config={"hidden_size": 1152}, eos_token_id=[1, 106]
    )
    assert (config.vocab_size, config.eos_token_ids) == (262208, (1, 106))
    assert windows(config).count(None) == 5
    assert {layer.rope.factor for layer in config.attentions if layer.window is None} == {8.0}
    assert {layer.rope.rope_type for layer in config.attentions if layer.window} == {"default"}


def test_shared_layers_read_the_last_of_their_kind_and_cache_nothing(read: Read) -> None:
    types = [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL]
    config = read(
        "gemma4_text",
        num_hidden_layers=6,
        layer_types=types,
        num_kv_shared_layers=3,
        use_double_wide_mlp=True,
        intermediate_size=100,
    )
    assert isinstance(config, Gemma4Config)
    assert [layer.source for layer in config.attentions] == [None, None, None, 1, 1, 2]
    assert config.intermediate_sizes == (100, 100, 100, 200, 200, 200)
    windowed, full = cache_groups(config.cache_specs)
    assert (windowed.spec, windowed.layer_ids) == (Sliding(4, 256, 512), (0, 1))
    assert (full.spec, full.layer_ids) == (Full(4, 512), (2,))


@pytest.mark.parametrize(
    ("fields", "heads"),
    [
        ({"global_head_dim": 64}, (4, 64)),
        ({"num_global_key_value_heads": 2}, (4, 512)),
        ({"num_global_key_value_heads": 2, "attention_k_eq_v": True}, (2, 512)),
        ({"num_global_key_value_heads": None, "attention_k_eq_v": True}, (4, 512)),
        # As transformers writes it.
        ({"per_layer_config": {"1": {"head_dim": 64, "num_key_value_heads": 1}}}, (1, 64)),
        ({"per_layer_config": {"01": {"head_dim": 256}}}, (4, 256)),
        ({"per_layer_config": {}, "global_head_dim": 64}, (4, 256)),
    ],
)
def test_the_heads_of_a_gemma4s_full_layers(
    read: Read, fields: dict[str, Any], heads: tuple[int, int]
) -> None:
    config = read("gemma4_text", num_hidden_layers=2, layer_types=[SLIDING, FULL], **fields)
    found = [(layer.num_kv_heads, layer.head_dim) for layer in config.attentions]
    assert found == [(4, 256), heads]


def test_the_last_layer_of_a_gemma4_is_full_whatever_the_file_says(read: Read) -> None:
    config = read("gemma4_text", num_hidden_layers=2, layer_types=[SLIDING, SLIDING])
    assert windows(config) == [512, None]


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "gemma4_text"])
def test_what_transformers_writes_is_all_known(
    read: Read, model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    _, written = registry.load_model_config(tmp_path)
    assert not [each for each in caplog.messages if "ignored" in each]
    assert written == read(model_type)


LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation: must be one of silu"),
        ("gemma2", {"sliding_window": None}, "sliding_window: missing"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping"),
        ("gemma2", {"final_logit_softcapping": -30.0}, "final_logit_softcapping"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("gemma2", {"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide 8"),
        ("gemma2", {"per_layer_config": {"1": {"head_dim": 8}}}, "per_layer_config"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (
            "gemma3_text",
            {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "sliding_window_pattern": 6},
            "sliding_window_pattern: 6 contradicts layer_types",
        ),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("gemma3_text", {"layer_types": [FULL]}, "layer_types: has 1 entries for 26"),
        ("gemma3", {"vision_config": {}}, "text_config: missing"),
        ("gemma3", {"text_config": {"head_dim": 15}}, "text_config.head_dim"),
        ("gemma4_text", {"enable_moe_block": True}, "num_experts: missing"),
        (
            "gemma4_text",
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 5},
            "top_k_experts: 5 of 4 experts",
        ),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ("gemma4_text", {"num_kv_shared_layers": 30}, "num_kv_shared_layers: 30 of 30 layers"),
        ("gemma4_text", {"num_kv_shared_layers": -1}, "num_kv_shared_layers: must be at least 0"),
        (
            "gemma4_text",
            {"num_kv_shared_layers": 25},
            "num_kv_shared_layers: 25: layer 5 is of full_attention, and no layer below 5 is",
        ),
        ("gemma4_text", {"vocab_size_per_layer_input": 1000}, "vocab_size_per_layer_input: 1000"),
        ("gemma4_text", {"global_head_dim": 63}, "global_head_dim"),
        (
            "gemma4_text",
            {"num_global_key_value_heads": 3, "attention_k_eq_v": True},
            "num_global_key_value_heads: 3 does not divide 8",
        ),
        ("gemma4_text", {"per_layer_config": {"30": {"head_dim": 64}}}, "per_layer_config"),
        (
            "gemma4_text",
            {"per_layer_config": {"5": {"head_dim": 64}}},
            "per_layer_config: the heads of layer 5 are not those of all full_attention",
        ),
        (
            "gemma4_text",
            {"per_layer_config": {"5": {"intermediate_size": 64}}},
            "per_layer_config.5.intermediate_size",
        ),
        ("gemma4_text", {"rope_parameters": {FULL: LINEAR}}, "rope_parameters.sliding_attention"),
        ("gemma4", {"text_config": {"enable_moe_block": True}}, "text_config.num_experts: missing"),
    ],
)
def test_what_is_refused(
    read: Read, model_type: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        read(model_type, **fields)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
