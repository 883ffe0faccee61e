"""GGUF files expanded: against the checkpoints that they were made of, and against transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from baton.services.gateway.tokenizer import TextCodec
from baton.services.launcher.fetch.download import FetchError
from baton.services.launcher.fetch.expansion import expand
from baton.shared.engine.models.registry import load_model_config
from tests.unit.launcher.made_up_gguf import (
    F16,
    F32,
    GEMMA_TOKENS,
    Q4_1,
    Q8_0,
    SMOLLM_TOKENS,
    gemma,
    llama,
    write_gemma,
    write_llama,
)

IDS = torch.arange(3, 27)[None]
TEXTS = [
    "hello world",
    "12 hello  12",
    "  hell 1 2<|im_end|>",
    "naïve 中文 👩‍👩‍👧\t\r\n\n",
    "<table>hello\n\n\n  <eos>",
    "",
    " ",
]


def expanded(path: Path, directory: Path, **generation: Any) -> Path:
    directory.mkdir()
    expand(path, directory, generation=generation, on_tensor=lambda done, total: None)
    return directory


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def from_directory(directory: Path) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    model, found = loaded
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_is_what_it_was(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(1)
    original = llama(tied=tied)
    write_llama(tmp_path / "m.gguf", original)
    directory = expanded(tmp_path / "m.gguf", tmp_path / "made", temperature=0.2)
    assert torch.equal(logits(from_directory(directory)), logits(original))
    config = json.loads((directory / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    # Float32 stands for the decimal that was meant.
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 100_000.0)
    assert json.loads((directory / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "temperature": 0.2,
    }
    # Served as it stands.
    _, ours = load_model_config(directory)
    assert (ours.num_layers, ours.eos_token_ids, ours.bos_token_id) == (2, (2,), 1)


def test_numbers_of_each_kind_are_expanded(tmp_path: Path) -> None:
    torch.manual_seed(2)
    kinds = {"token_embd": Q8_0, "attn_q": Q4_1, "attn_k": Q4_1, "ffn_up": F16, "ffn_norm": F32}
    stored = write_llama(tmp_path / "m.gguf", llama(), kinds=kinds)
    found = load_file(expanded(tmp_path / "m.gguf", tmp_path / "made") / "model.safetensors")
    assert set(found) == set(stored)
    for name, values in stored.items():
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name], values), name


def test_a_gemma_is_what_it_was(tmp_path: Path) -> None:
    torch.manual_seed(3)
    original = gemma()
    write_gemma(tmp_path / "m.gguf", original)
    directory = expanded(tmp_path / "m.gguf", tmp_path / "made")
    theirs, ours = logits(original), logits(from_directory(directory))
    # 1 was added in float32.
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "gemma3_text"
    assert config["layer_types"] == original.config.layer_types
    assert (config["sliding_window"], config["rope_local_base_freq"]) == (8, 10_000.0)


@pytest.mark.parametrize("kind", ["smollm", "gemma"])
def test_the_tokenizer_is_transformers(tmp_path: Path, kind: str) -> None:
    if kind == "smollm":
        write_llama(tmp_path / "m.gguf", llama())
    else:
        write_gemma(tmp_path / "m.gguf", gemma())
    directory = expanded(tmp_path / "m.gguf", tmp_path / "made")
    theirs, ours = AutoTokenizer.from_pretrained(directory), TextCodec.load(directory)
    assert ours is not None
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    messages = [{"role": "user", "content": "hello 12"}]
    if kind == "smollm":
        told = theirs.apply_chat_template(messages, tokenize=False)
        assert ours.render_chat(messages) == told == "<|im_start|>user\nhello 12<|im_end|>\n"
        assert theirs.eos_token == "<|im_end|>"


def tokens_of(directory: Path, text: str, names: list[str]) -> list[str]:
    codec = TextCodec.load(directory)
    assert codec is not None
    return [names[token_id] for token_id in codec.encode(text)]


def test_smollm_splits_digits(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", llama())
    directory = expanded(tmp_path / "m.gguf", tmp_path / "made")
    assert tokens_of(directory, "hello 12  1", SMOLLM_TOKENS) == [
        *("hello", "Ġ", "1", "2", "ĠĠ", "1"),
    ]


def test_gemma_merges_follow_from_the_vocabulary(tmp_path: Path) -> None:
    write_gemma(tmp_path / "m.gguf", gemma())
    directory = expanded(tmp_path / "m.gguf", tmp_path / "made")
    assert tokens_of(directory, "hello  hé\n\n<table>", GEMMA_TOKENS) == [
        *("<bos>", "hello", "  ", "h", "<0xC3>", "<0xA9>", "\n\n", "<table>"),
    ]


NAN = np.full((96,), np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"drop": "blk.1.ffn_down.weight"}, "blk.1.ffn_down.weight: no such tensor"),
        ({"drop": "output_norm.weight"}, "output_norm.weight: no such tensor"),
        ({"extra": {"rope_freqs.weight": NAN}}, "rope_freqs.weight: it is not known what"),
        (
            {"drop": "output_norm.weight", "extra": {"output_norm.weight": NAN}},
            "output_norm.weight: holds what is no finite number",
        ),
        (
            {"drop": "output_norm.weight", "extra": {"output_norm.weight": NAN[:5]}},
            "output_norm.weight: has the shape [5], not [96]",
        ),
        (
            {"metadata": {"llama.attention.head_count": 3}},
            "blk.0.attn_q.weight: has the shape [192, 96], not [96, 96]",
        ),
        (
            {"metadata": {"llama.block_count": 3}},
            "blk.2.attn_k.weight: no such tensor",
        ),
        ({"metadata": {"llama.embedding_length": None}}, "llama.embedding_length: missing"),
        (
            {"metadata": {"llama.embedding_length": "96"}},
            "llama.embedding_length: must be of type int, not '96'",
        ),
        ({"metadata": {"llama.expert_count": 8}}, "llama.expert_count: is not expanded"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type: is not"),
        (
            {"metadata": {"llama.rope.dimension_count": 16}},
            "llama.rope.dimension_count: must be 32",
        ),
        (
            {"metadata": {"tokenizer.ggml.pre": "llama-bpe"}},
            "tokenizer.ggml.pre: tokenizers of kind gpt2 llama-bpe are not expanded",
        ),
        ({"metadata": {"tokenizer.ggml.add_eos_token": True}}, "add_eos_token: is not expanded"),
        ({"metadata": {"tokenizer.ggml.eos_token_id": 99_999}}, "eos_token_id: 99999 is no token"),
        ({"metadata": {"tokenizer.ggml.merges": ["h zz"]}}, "tokenizer.ggml.merges: "),
        ({"metadata": {"tokenizer.ggml.tokens": ["a", "a"]}}, "tokens: a token stands there twice"),
        ({"metadata": {"tokenizer.ggml.token_type": [1]}}, "token_type: has 1 entries for"),
    ],
)
def test_what_is_missing_or_not_known_is_named(
    tmp_path: Path, changes: Mapping[str, Any], words: str
) -> None:
    write_llama(tmp_path / "m.gguf", llama(), **changes)
    with pytest.raises(FetchError) as caught:
        expanded(tmp_path / "m.gguf", tmp_path / "made")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 3, 4, 40, 3000, -100])
def test_a_file_that_is_cut_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "m.gguf"
    write_llama(path, llama())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FetchError, match="m.gguf: not a whole GGUF file"):
        expanded(path, tmp_path / "made")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    write_llama(tmp_path / "m.gguf", llama())
    (tmp_path / "made" / name).mkdir(parents=True)
    with pytest.raises((FetchError, OSError), match=f"{name}.*Is a directory|Is a.*{name}"):
        expand(tmp_path / "m.gguf", tmp_path / "made", generation={}, on_tensor=lambda *_: None)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_llama(path, llama())
    path.write_bytes(path.read_bytes().replace(b"llama", b"lhama", 2))
    with pytest.raises(FetchError, match="general.architecture: 'lhama' is not one of"):
        expanded(path, tmp_path / "made")
