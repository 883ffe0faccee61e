"""config.json of each model type: what is normalised, what is refused in one line, what is ignored.

The rule: a field is refused where the type's code in transformers reads it and the engine does not
compute what it says.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from baton.shared.engine.models import registry
from baton.shared.engine.models.llama import LLAMA
from baton.shared.engine.models.model_config import LayerStyle, ModelConfig
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.models.rope_config import RopeConfig
from baton.shared.model_files.fields import ModelError
from tests.unit.engine.tiny_latents import ALIASES
from tests.unit.engine.tiny_models import rename_alias

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "torch_dtype": "bfloat16",
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4}
FULL, SLIDING = "full_attention", "sliding_attention"
Read = Callable[..., ModelConfig]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """The config of BASE with changes; a field of which `None` is said is null."""

    def read(*left_out: str, **changes: Any) -> ModelConfig:
        values = {name: v for name, v in BASE.items() if name not in left_out}
        (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
        _, config = registry.load_model_config(tmp_path)
        return config

    return read


def ignored_fields(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log names, in one line or none."""
    lines = [record for record in caplog.records if "ignored" in record.getMessage()]
    assert len(lines) <= 1
    return str(lines[0].__dict__["fields"]["fields"]).split() if lines else []


def test_missing_fields_take_the_defaults_of_transformers(read: Read) -> None:
    config = read(num_key_value_heads=None, rms_norm_eps=None)
    [layer] = set(config.attentions)
    assert (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.window) == (4, 4, 16, None)
    assert layer.rope == RopeConfig(theta=10000.0, rope_type="default")
    assert (config.tie_word_embeddings, config.style) == (False, LayerStyle())
    assert (config.rms_norm_eps, config.num_layers, config.dtype) == (1e-6, 2, "bfloat16")
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), 1)
    assert read("max_position_embeddings").max_position_embeddings == 2048


def test_a_mistral_has_defaults_of_its_own(read: Read) -> None:
    heads = {"num_attention_heads": 16, "model_type": "mistral", "sliding_window": None}
    config = read("num_key_value_heads", "max_position_embeddings", **heads)
    assert (config.attentions[0].num_kv_heads, config.max_position_embeddings) == (8, 131072)
    assert read(**heads, num_key_value_heads=None).attentions[0].num_kv_heads == 16


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"sliding_window": None}, None),
        ({"sliding_window": 64}, 64),
        ({"sliding_window": 64, "layer_types": [SLIDING] * 2}, 64),
        # Its masks look at sliding_window alone.
        ({"sliding_window": 64, "layer_types": [FULL] * 2}, 64),
        ({"sliding_window": None, "layer_types": [FULL] * 2}, None),
        ({"sliding_window": 512}, None),
        ({"max_position_embeddings": 8192}, 4096),
        ({"use_sliding_window": False, "sliding_window": 64}, 64),
    ],
)
def test_the_window_of_a_mistral(read: Read, fields: dict[str, Any], window: int | None) -> None:
    config = read(model_type="mistral", **fields)
    assert {layer.window for layer in config.attentions} == {window}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}},
    ],
)
def test_both_spellings_of_rope(read: Read, fields: dict[str, Any]) -> None:
    for value in ("rope_scaling", "rope_parameters"):
        if value in fields:
            fields = {**fields, value: {**fields[value], "original_max_position_embeddings": 64}}
    expected = RopeConfig(500.0, "llama3", 8.0, 1.0, 4.0, 64)
    assert read(**fields).attentions[0].rope == expected
    # transformers gives the one outside precedence.
    outside = read(**fields, original_max_position_embeddings=32)
    assert outside.attentions[0].rope.original_max_position == 32


@pytest.mark.parametrize(
    "fields",
    [
        {"is_llama_config": True},
        {"unk_token_id": 0},
        {"_model_name_or_path": "someone/something"},
        {"transformers.js_config": {"dtype": "q4"}},
        {"rope_interleaved": False},
        {"partial_rotary_factor": 0.5},
        {"final_logit_softcapping": 30.0},
        {"attention_sinks": 4},
        {"temperature": 0.7},
        {"sliding_window": 64, "layer_types": [FULL] * 2},
        {"model_type": "mistral", "sliding_window": None, "attention_bias": True},
        {"rope_parameters": {"rope_type": "default", "mystery": 2}},
    ],
)
def test_what_transformers_does_not_read_is_ignored_in_one_line(
    read: Read, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    plain = read(**({"sliding_window": None} | fields if "model_type" in fields else {}))
    caplog.clear()
    caplog.set_level(logging.INFO)
    assert read(**fields) == plain
    names = {"rope_parameters.mystery"} if "rope_parameters" in fields else set(fields)
    assert set(ignored_fields(caplog)) == names - {"model_type", "layer_types"} - (
        {"sliding_window"} if "model_type" in fields else set()
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"partial_rotary_factor": 1.0},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 10000.0},
        {"rope_parameters": {"rope_theta": 10000.0}, "rope_theta": 10000},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 1}},
        {"rope_scaling": {}},
        {"layer_types": [FULL] * 2},
        {"layer_types": ["attention"] * 2},
        {"sliding_window": None},
        {"sliding_window": 512},
        {"attention_chunk_size": None},
        {"hidden_act": "silu"},
        {"hidden_act": "swish"},
        {"is_causal": True},
        {"per_layer_config": {}},
        {"quantization_config": None},
        {"use_cache": True, "initializer_range": 0.02, "pad_token_id": 0, "pretraining_tp": 2},
        {"new_trick": None},
    ],
)
def test_neutral_values_are_taken_in_silence(
    read: Read, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert read(**fields) == read()
    assert ignored_fields(caplog) == []


@pytest.mark.parametrize("model_type", sorted(registry._TYPES))
def test_what_transformers_writes_is_all_known(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    # What has no good default: heads of 42 2/3 numbers, no number at all.
    needed = {"glm4_moe": {"head_dim": 128}, "deepseek_v2": {"num_experts_per_tok": 6}}
    known_as = ALIASES.get(model_type, model_type)
    AutoConfig.for_model(known_as, **needed.get(model_type, {})).save_pretrained(tmp_path)
    rename_alias(tmp_path, model_type)
    registry.load_model_config(tmp_path)
    assert ignored_fields(caplog) == []


COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        }
    },
}


def compressed(**weights: Any) -> dict[str, Any]:
    changed = json.loads(json.dumps(COMPRESSED))
    changed["config_groups"]["group_0"]["weights"].update(weights)
    return {"quantization_config": changed}


def test_weights_of_8_bits_with_scales_are_taken(
    read: Read, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert read(**compressed()).quantization
    assert read(**compressed(type="float", strategy="tensor")).quantization
    assert read().quantization is None
    assert ignored_fields(caplog) == []


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "mamba"}, 'model_type: "mamba" is not supported; supported are '),
        ({"model_type": None}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 64.5}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 66}, "hidden_size"),
        ({"hidden_size": 2}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: must be at least 1"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: must be at most 10000"),
        ({"intermediate_size": 10**30}, "intermediate_size: must be at most"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"is_causal": False}, "is_causal"),
        ({"per_layer_config": {"1": {"head_dim": 8}}}, "per_layer_config"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"attention_chunk_size": 64}, "attention_chunk_size"),
        ({"layer_types": [FULL, SLIDING]}, "layer_types"),
        ({"layer_types": [FULL]}, "layer_types: has 1 entries for 2"),
        ({"layer_types": [FULL, "linear_attention"]}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"model_type": "mistral", "layer_types": [FULL, SLIDING]}, "layer_types"),
        (
            {"model_type": "mistral", "sliding_window": None, "layer_types": [SLIDING] * 2},
            "layer_types",
        ),
        ({"model_type": "mistral", "hidden_act": "gelu"}, "hidden_act"),
        ({"eos_token_id": 320}, "eos_token_id"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 4]}},
            "rope_scaling.mrope_section: [2, 3, 4] do not add up to the 8 pairs",
        ),
        ({"rope_parameters": {"mrope_section": [9, -1]}}, "rope_parameters.mrope_section"),
        ({"rope_parameters": {"mrope_section": 8}}, "rope_parameters.mrope_section"),
        ({"rope_scaling": {"type": "ntk", "factor": 2}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4}, "rope_theta"),
        (
            {"rope_scaling": {"type": "llama3", **LLAMA3}, "rope_parameters": {"rope_theta": 1e4}},
            "rope_scaling: contradicts rope_parameters",
        ),
        (
            {"layer_types": [FULL] * 2, "rope_parameters": {FULL: {"rope_theta": 1e6}}},
            "rope_parameters.full_attention",
        ),
        ({"quantization_config": {"quant_method": "bnb"}}, "quantization_config.quant_method"),
        ({"quantization_config": {}}, "quantization_config.quant_method"),
        (compressed(num_bits=9), "quantization_config.config_groups.group_0.weights.num_bits"),
        (compressed(strategy="token"), "weights.strategy"),
        (compressed(dynamic=True), "weights.dynamic"),
    ],
)
def test_what_is_refused(read: Read, changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read(**changes)
    message = str(caught.value)
    assert str(tmp_path / "config.json") in message and field in message
    assert "\n" not in message


def test_a_type_may_be_registered_from_outside(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_TYPES", dict(registry._TYPES))
    with pytest.raises(ModelError, match="model_type"):
        read(model_type="llama_of_ours")
    registry.register(ModelType("llama_of_ours", LLAMA.configure, LLAMA.build, LLAMA.names))
    assert read(model_type="llama_of_ours").model_type == "llama_of_ours"
