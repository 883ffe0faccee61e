"""Reading config.json: what is normalised, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baton.shared.engine.config import (
    EngineConfig,
    ModelError,
    RopeConfig,
    load_model_config,
    resolve_max_model_len,
    served_name,
)

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


def write(model_dir: Path, **changes: Any) -> Path:
    (model_dir / "config.json").write_text(json.dumps({**BASE, **changes}))
    return model_dir


def test_a_model_is_called_as_its_directory_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "4f2a91").mkdir()
    (tmp_path / "tale").symlink_to("4f2a91")
    monkeypatch.chdir(tmp_path)
    for given in ("tale", "tale/", "./tale", "4f2a91/../tale", str(tmp_path / "tale")):
        assert served_name(Path(given)) == "tale"
    monkeypatch.chdir(tmp_path / "4f2a91")
    assert served_name(Path()) == "4f2a91"


def test_missing_fields_take_the_defaults_of_transformers(tmp_path: Path) -> None:
    config = load_model_config(write(tmp_path, num_key_value_heads=None, rms_norm_eps=None))
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (4, 16, 1e-6)
    assert config.rope == RopeConfig(theta=10000.0, rope_type="default")
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False,) * 3
    assert (config.eos_token_ids, config.bos_token_id, config.dtype) == ((2,), 1, "bfloat16")


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}},
    ],
)
def test_both_spellings_of_rope(fields: dict[str, Any], tmp_path: Path) -> None:
    for value in ("rope_scaling", "rope_parameters"):
        if value in fields:
            fields = {**fields, value: {**fields[value], "original_max_position_embeddings": 64}}
    config = load_model_config(write(tmp_path, **fields))
    assert config.rope == RopeConfig(500.0, "llama3", 8.0, 1.0, 4.0, 64)


def test_end_of_sequence_ids_come_from_the_generation_config(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load_model_config(tmp_path).eos_token_ids == (7, 9)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert load_model_config(tmp_path).eos_token_ids == (2,)


def test_harmless_and_switched_off_fields_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, use_cache=True, initializer_range=0.02, new_trick=None, other_trick=False)
    load_model_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "gemma2"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 64.5}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 66}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"eos_token_id": 320}, "eos_token_id"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"mystery": 2}}, "rope_parameters.mystery"),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4}, "rope_theta"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_model_config(write(tmp_path, **changes))
    message = str(caught.value)
    assert str(tmp_path / "config.json") in message and field in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", '{"a": ' + "[" * 10**5])
def test_a_file_that_is_not_a_json_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json: ") as caught:
        load_model_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_directory_or_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such model directory"):
        load_model_config(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config\.json: no such file"):
        load_model_config(tmp_path)


def test_max_model_len_is_limited_by_the_model(tmp_path: Path) -> None:
    model = load_model_config(write(tmp_path))
    assert resolve_max_model_len(EngineConfig(tmp_path), model) == 512
    assert resolve_max_model_len(EngineConfig(tmp_path, max_model_len=100), model) == 100
    with pytest.raises(ModelError, match=r"max_model_len: 513 .* max_position_embeddings 512"):
        resolve_max_model_len(EngineConfig(tmp_path, max_model_len=513), model)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", "tpu"),
        ("dtype", "float64"),
        ("block_size", 24),
        ("block_size", 256),
        ("num_blocks", 0),
        ("token_budget", 0),
    ],
)
def test_engine_settings_out_of_range(field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=field):
        EngineConfig(**{"model_dir": tmp_path, field: value})
