"""The committed demo model: layout, tokenizer, chat template, agreement of special ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, pre_tokenizers

from models.training.text import CHAT_TEMPLATE, ROLES, chat_text

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
MAX_WEIGHT_BYTES = 10_000_000
TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def read_json(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DEMO / name).read_text())
    return content


def read_weight_header() -> dict[str, dict[str, Any]]:
    """Tensor name -> dtype, shape and offsets, from the head of the safetensors file."""
    with (DEMO / "model.safetensors").open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header: dict[str, dict[str, Any]] = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    return header


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return read_json("config.json")


def test_config_describes_a_small_grouped_query_llama(config: dict[str, Any]) -> None:
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] >= 4096
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    assert 1 < kv_heads < heads and heads % kv_heads == 0
    assert config["head_dim"] in (32, 64)


def test_weights_fit_the_config_and_the_size_limit(config: dict[str, Any]) -> None:
    assert (DEMO / "model.safetensors").stat().st_size <= MAX_WEIGHT_BYTES
    header = read_weight_header()
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert "lm_head.weight" not in header

    hidden, wide = config["hidden_size"], config["intermediate_size"]
    q_size = config["num_attention_heads"] * config["head_dim"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
        "self_attn.q_proj": [q_size, hidden],
        "self_attn.k_proj": [kv_size, hidden],
        "self_attn.v_proj": [kv_size, hidden],
        "self_attn.o_proj": [hidden, q_size],
        "mlp.gate_proj": [wide, hidden],
        "mlp.up_proj": [wide, hidden],
        "mlp.down_proj": [hidden, wide],
    }
    expected = {
        f"model.layers.{index}.{name}.weight": shape
        for index in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }
    expected["model.embed_tokens.weight"] = [config["vocab_size"], hidden]
    expected["model.norm.weight"] = [hidden]
    assert {name: entry["shape"] for name, entry in header.items()} == expected


def test_special_ids_agree(config: dict[str, Any]) -> None:
    names, generation = read_json("tokenizer_config.json"), read_json("generation_config.json")
    bos_id = TOKENIZER.token_to_id(names["bos_token"])
    eos_id = TOKENIZER.token_to_id(names["eos_token"])
    end_id = TOKENIZER.token_to_id("<|end|>")
    assert None not in (bos_id, eos_id, end_id)
    assert config["bos_token_id"] == generation["bos_token_id"] == bos_id
    assert config["eos_token_id"] == generation["eos_token_id"] == [eos_id, end_id]
    assert generation["pad_token_id"] == TOKENIZER.token_to_id(names["pad_token"])
    assert TOKENIZER.encode("a").ids[0] == bos_id
    assert TOKENIZER.get_vocab_size() == config["vocab_size"]
    assert names["model_max_length"] == config["max_position_embeddings"]


@settings(max_examples=200)
@given(text=st.text())
def test_tokenizer_returns_any_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces ",
        "\t\r\n\n",
        "naïve Ωmega 中文 שלום",
        "👩‍👩‍👧 e\u0301",
        "\x00\x7f\ufffd",
    ],
)
def test_tokenizer_returns_awkward_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_every_byte_has_a_token() -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    assert len(alphabet) == 256
    assert all(TOKENIZER.token_to_id(character) is not None for character in alphabet)


def test_prose_is_compressed() -> None:
    text = "And it came to pass in those days, that there went out a decree."
    assert len(TOKENIZER.encode(text, add_special_tokens=False).ids) < len(text) / 3


def test_chat_template_renders_in_a_sandbox() -> None:
    names = read_json("tokenizer_config.json")
    assert names["chat_template"] == CHAT_TEMPLATE
    template = ImmutableSandboxedEnvironment().from_string(names["chat_template"])
    turns = [(role, f"{role} says") for role in ROLES]
    messages = [{"role": role, "content": content} for role, content in turns]

    closed = template.render(messages=messages, bos_token=names["bos_token"])
    assert closed == chat_text(turns)
    opened = template.render(
        messages=messages, bos_token=names["bos_token"], add_generation_prompt=True
    )
    assert opened == closed + "<|assistant|>"

    tokens = TOKENIZER.encode(opened, add_special_tokens=False).tokens
    marks = [token for token in tokens if token.startswith("<|")]
    ends = [mark for role in ROLES for mark in (f"<|{role}|>", "<|end|>")]
    assert marks == ["<|bos|>", *ends, "<|assistant|>"]


def test_the_draft_model_is_a_small_sibling(config: dict[str, Any]) -> None:
    draft_dir = DEMO.parent / "demo-draft"
    draft = json.loads((draft_dir / "config.json").read_text())
    for name in ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id"):
        assert draft[name] == config[name]
    sizes = [(path / "model.safetensors").stat().st_size for path in (draft_dir, DEMO)]
    assert 4 * sizes[0] <= sizes[1]
    tokenizers = [(path / "tokenizer.json").read_bytes() for path in (draft_dir, DEMO)]
    assert tokenizers[0] == tokenizers[1]
