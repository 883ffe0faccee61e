"""`baton models`: what is served, and what a model directory is and needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from baton.services.launcher.__main__ import main
from baton.services.launcher.models import about
from baton.shared.engine.models import registry
from tests.unit.launcher.made_up_gguf import llama, write_llama

DEMO = Path(__file__).parents[3] / "models" / "demo"
SIZES = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
_LAYER = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
    "input_layernorm": (64,),
    "post_attention_layernorm": (64,),
}
TENSORS = {
    f"model.{name}.weight": np.zeros(shape, np.float16)
    for name, shape in {
        "embed_tokens": (32, 64),
        "norm": (64,),
        **{f"layers.{index}.{name}": shape for index in (0, 1) for name, shape in _LAYER.items()},
    }.items()
}


def make(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SIZES, **config}), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a worker that is not asked: that takes two seconds, most of them for torch."""
    monkeypatch.setattr("baton.services.launcher.models._ask_worker", lambda directory: True)


def test_without_a_name_all_types_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    out = capsys.readouterr().out.split()
    assert {each.name for each in registry.model_types()} <= set(out)
    assert main(["models", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["types"] == [each.name for each in registry.model_types()]
    assert "smollm2" in told["fetched_by_name"]


def test_what_the_demo_is(
    capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    assert main(["models", str(DEMO)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{DEMO}: served"
    assert "  type     llama, by Baton's own code" in lines
    assert "  text     prompts and chats" in lines
    assert lines[-1] == f"  start    baton up --model {DEMO}"
    request.getfixturevalue("accepted")
    told = about(str(DEMO))
    # bfloat16, and a key and a value for each of 2 heads of 64 in 6 layers: by the token.
    assert told["stored_bytes"] == 2 * told["num_numbers"] == told["weights_bytes"]["bfloat16"][0]
    config = json.loads((DEMO / "config.json").read_text())
    heads = config["num_key_value_heads"] * config["hidden_size"] // config["num_attention_heads"]
    by_token = 2 * heads * config["num_hidden_layers"] * 4
    assert told["cache_bytes"]["float32"] == by_token * told["max_model_len"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"hidden_act": "relu"}, 'hidden_act: only "silu" or "swish" is supported, not "relu"'),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"vocab_size": None}, "vocab_size: missing"),
    ],
)
def test_what_is_not_computed_is_refused_with_its_field(
    config: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(tmp_path / "m", {"rope_theta": 1e4, **config}, {})
    assert main(["models", model]) == 1
    said = capsys.readouterr()
    assert said.out == f"{model}: not served\n"
    assert said.err.startswith(f"baton: {model}/config.json: ") and reason in said.err
    assert main(["models", model, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["served"] is False and reason in told["reason"]


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", str(tmp_path / "nowhere")]) == 1
    assert "no such model directory" in capsys.readouterr().err
    model = make(tmp_path / "m", {}, {})
    assert main(["models", model]) == 1
    assert "model.embed_tokens.weight: missing tensor" in capsys.readouterr().err
    (tmp_path / "m" / "model.safetensors").unlink()
    assert main(["models", model]) == 1
    assert "model.safetensors: no such file" in capsys.readouterr().err


def test_shapes_that_are_not_config_jsons_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a worker does, where there is torch."""
    name = "model.layers.1.mlp.up_proj.weight"
    model = make(tmp_path / "m", {}, {**TENSORS, name: np.zeros((64, 96), np.float16)})
    assert main(["models", model]) == 1
    said = capsys.readouterr()
    assert said.out == f"{model}: not served\n"
    reason = f"{name}: shape [64, 96] where config.json makes it [96, 64]"
    assert said.err == f"baton: {model}/model.safetensors: {reason}\n"
    monkeypatch.setattr("baton.services.launcher.models.find_spec", lambda name: None)
    assert main(["models", model]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{model}: may be served"
    assert lines[1].endswith("by Baton's own code, if a start finds its tensors right")
    assert about(model)["served"] is None


@pytest.mark.usefixtures("accepted")
def test_quantised_numbers_are_counted_as_they_are_meant(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    module = "model.layers.0.self_attn.q_proj"
    tensors = {
        **TENSORS,
        f"{module}.qweight": np.zeros((8, 64), np.int32),
        f"{module}.qzeros": np.zeros((2, 8), np.int32),
        f"{module}.scales": np.zeros((2, 64), np.float16),
        f"{module}.g_idx": np.arange(64, dtype=np.int32) // 32,
    }
    del tensors[f"{module}.weight"]
    told = about(make(tmp_path / "m", config, tensors))
    assert told["num_numbers"] == sum(each.size for each in TENSORS.values())
    assert told["stored_as"] == ["gptq", "F16", "I32"]
    assert told["weights_bytes"]["bfloat16"] == [told["stored_bytes"], 2 * told["num_numbers"]]
    assert "--dtype bfloat16" in told["flags"]


@pytest.mark.usefixtures("accepted")
def test_a_window_keeps_no_more_than_it_sees(tmp_path: Path) -> None:
    config = {"model_type": "mistral", "sliding_window": 64, "max_position_embeddings": 4096}
    told = about(make(tmp_path / "m", config, TENSORS))
    assert told["layers"] == {"sliding": 2}
    assert told["cache_bytes"]["float32"] == 2 * 2 * 16 * 4 * 2 * 64
    assert told["text"].startswith("token ids only")


@pytest.mark.usefixtures("accepted")
def test_what_has_to_be_installed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(tmp_path / "m", {}, TENSORS)
    (tmp_path / "m" / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr(
        "baton.services.launcher.models.find_spec",
        lambda name: None if name == "sentencepiece" else name,
    )
    assert main(["models", model]) == 0
    assert "  missing  pip install '.[sentencepiece]'" in capsys.readouterr().out


def test_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "m.gguf"
    write_llama(path, llama())
    told = about(str(path))
    assert told["model_type"] == "llama" and told["stored_as"][0].startswith("GGUF ")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:100])
    assert main(["models", str(tmp_path / "cut.gguf")]) == 1


def test_what_transformers_cannot_run_here_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the words of a start, which come from a process with torch."""
    model = make(tmp_path / "m", {"model_type": "bloom"}, {})
    assert main(["models", model]) == 1
    said = capsys.readouterr()
    assert said.out == f"{model}: not served\n"
    reason = 'model_type: "bloom": its code takes no position_ids'
    assert said.err == f"baton: {model}/config.json: {reason}\n"


def test_a_type_without_a_file_of_its_own_may_be_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(tmp_path / "m", {"model_type": "olmo2"}, {})
    shutil.copy(DEMO / "tokenizer.json", tmp_path / "m")
    assert main(["models", model]) == 0
    assert f"{model}: may be served" in capsys.readouterr().out
    spec = "baton.services.launcher.models.find_spec"
    # Without torch nothing is computed on paper.
    monkeypatch.setattr(spec, lambda name: None if name == "torch" else name)
    assert about(model)["extras"] == {"worker": False, "transformers": True}
    monkeypatch.setattr(spec, lambda name: None)
    assert main(["models", model]) == 1
    assert '"olmo2" is not supported' in capsys.readouterr().err
