"""What every process reads of a model directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from baton.shared.model_files.fields import Fields, ModelError
from baton.shared.model_files.info import ModelInfo, load_media_tokens, load_model_info, served_name
from baton.shared.model_files.type_defaults import DEFAULTS
from tests.unit.engine.tiny_latents import ALIASES

BASE: dict[str, Any] = {
    "model_type": "whatever",
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def write(model_dir: Path, **changes: Any) -> Path:
    (model_dir / "config.json").write_text(json.dumps({**BASE, **changes}))
    return model_dir


def test_nothing_is_said_of_arithmetic(tmp_path: Path) -> None:
    """The gateway serves whatever its workers compute."""
    write(tmp_path, hidden_act="swirl", quantization_config={"quant_method": "gptq"})
    assert load_model_info(tmp_path) == ModelInfo("whatever", 320, 512, (2,), 1)
    write(tmp_path, max_position_embeddings=None, eos_token_id=None, bos_token_id=None)
    assert load_model_info(tmp_path) == ModelInfo("whatever", 320, None, (), None)


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


def test_end_of_sequence_ids_come_from_the_generation_config(tmp_path: Path) -> None:
    write(tmp_path)
    generation = tmp_path / "generation_config.json"
    generation.write_text('{"eos_token_id": [7, 9]}')
    assert load_model_info(tmp_path).eos_token_ids == (7, 9)
    generation.write_text('{"temperature": 0.6}')
    assert load_model_info(tmp_path).eos_token_ids == (2,)
    generation.write_text('{"eos_token_id": 320}')
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id: .* outside"):
        load_model_info(tmp_path)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": None}, "model_type"),
        ({"model_type": 3}, "model_type"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"max_position_embeddings": 512.5}, "max_position_embeddings"),
        ({"eos_token_id": 320}, "eos_token_id"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_model_info(write(tmp_path, **changes))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: {field}: ") and "\n" not in message


def test_a_multimodal_model_is_its_text_part_to_those_who_do_not_compute(tmp_path: Path) -> None:
    def info(**fields: Any) -> ModelInfo:
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return load_model_info(tmp_path)

    text = {"model_type": "ministral3", "vocab_size": 400, "eos_token_id": 7}
    nested = info(model_type="mistral3", text_config=text, vision_config={"vocab_size": 5})
    assert nested == ModelInfo("mistral3", 400, 262144, (7,), 1)
    # What is said of the whole model goes before.
    assert info(model_type="mistral3", text_config=text, eos_token_id=[8]).eos_token_ids == (8,)
    # The vocabulary may be left out.
    bare = {"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2"}}
    assert info(**bare) == ModelInfo("qwen2_5_vl", 152064, 32768, (151645,), 151643)
    flat = info(model_type="qwen2_5_vl", vocab_size=900, max_position_embeddings=64)
    assert flat == ModelInfo("qwen2_5_vl", 900, 64, (), None)
    unknown = info(model_type="new_vl", text_config={"vocab_size": 320, "bos_token_id": 4})
    assert unknown == ModelInfo("new_vl", 320, None, (), 4)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert info(model_type="mistral3", text_config=text).eos_token_ids == (5, 6)
    with pytest.raises(ModelError, match=r"config\.json: text_config\.vocab_size: "):
        info(model_type="mistral3", text_config={"vocab_size": "many"})
    with pytest.raises(ModelError, match=r"config\.json: text_config: must be an object"):
        info(model_type="mistral3", text_config=[1])


def test_where_a_multimodal_model_would_see_and_hear(tmp_path: Path) -> None:
    def tokens(**fields: Any) -> dict[int, str]:
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return load_media_tokens(tmp_path)

    assert tokens(model_type="llama") == {}
    assert tokens(model_type="mistral3") == {10: "image_token_index"}
    named = {"image_token_id": 5, "video_token_id": None, "vision_start_token_id": 3}
    assert tokens(model_type="qwen3_vl", **named) == {
        5: "image_token_id",
        3: "vision_start_token_id",
    }
    assert set(tokens(model_type="gemma4").values()) == {
        *("image_token_id", "video_token_id", "audio_token_id"),
        *("boi_token_id", "boa_token_id"),
    }
    # Of one that nothing is known of, what it says.
    assert tokens(model_type="new_vl", image_token_index=7) == {7: "image_token_index"}
    with pytest.raises(ModelError, match=r"config\.json: image_token_id: "):
        tokens(model_type="qwen3_vl", image_token_id="<image>")


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    config = CONFIG_MAPPING[ALIASES.get(model_type, model_type)]()
    # Of those of gemma4 that some of its layers have otherwise.
    config.allow_global_per_layer_attribute_access = True
    for name, value in DEFAULTS[model_type].items():
        if name == "sliding_window" and hasattr(config, "use_sliding_window"):
            # Of qwen2_moe, none is 0.
            assert config.use_sliding_window or not config.sliding_window
            continue
        if value == "auto":
            # What transformers has worked out already.
            assert name == "mamba_d_head"
            inner = getattr(config, "mamba_d_ssm", config.mamba_expand * config.hidden_size)
            assert config.mamba_d_head * config.mamba_n_heads == inner
            continue
        assert getattr(config, name) == value, name


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", '{"a": ' + "[" * 10**5])
def test_a_file_that_is_not_a_json_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json: ") as caught:
        load_model_info(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_directory_that_may_not_be_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(ModelError, match="closed/model: Permission denied"):
        load_model_info(tmp_path / "closed" / "model")


def test_a_directory_or_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such model directory"):
        load_model_info(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config\.json: no such file"):
        load_model_info(tmp_path)


@pytest.mark.parametrize("value", [0, -1e-3, float("nan"), float("inf"), 10**400, "1", True])
def test_a_number_is_finite_and_positive(value: Any) -> None:
    with pytest.raises(ModelError, match=r"^x\.json: y: must be "):
        Fields(Path("x.json"), {"y": value}).number("y")
    with pytest.raises(ModelError, match=r"^x\.json: y: must be "):
        Fields(Path("x.json"), {"y": [1, value]}).numbers("y")


def test_a_field_that_says_something_else_counts_as_unread() -> None:
    fields = Fields(Path("x.json"), {"a": 1.0, "b": 2})
    assert [fields.says(name, 1) for name in "abc"] == [True, False, False]
    assert fields.unread() == ["b"]


def test_fields_that_nobody_asked_for_are_named_with_their_place() -> None:
    fields = Fields(Path("x.json"), {"a": 1, "b": {"c": 2, "d": 3}, "e": None, "f": 0, "g": {}})
    assert fields.integer("a") == 1
    inner = fields.object("b")
    assert inner is not None and inner.integer("c") == 2
    assert fields.unread(harmless=["f"]) == ["g", "b.d"]


def test_a_name_that_is_not_utf_8_can_be_sent_all_the_same() -> None:
    assert served_name(Path(os.fsdecode(b"/models/m\xf6del"))) == "m\ufffddel"
    assert served_name(Path("/models/mödel")) == "mödel"
