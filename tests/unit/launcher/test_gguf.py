"""GGUF files expanded: against the checkpoints that they were made of, and against transformers."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from argparse import ArgumentTypeError
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Regex, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

from baton.services.gateway.tokenizer import TextCodec
from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.gguf_weights import GgufWeights, expanded_weights
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.models.registry import load_model_config
from baton.shared.engine.quantised.gguf import KINDS
from baton.shared.engine.quantised.weight import QuantisedWeight
from baton.shared.model_files.fields import ModelError
from baton.shared.model_files.gguf.directory import directory_of, write_directory
from baton.shared.model_files.gguf.file import GgufFile
from baton.shared.model_files.gguf.vocabulary import read_vocabulary
from baton.shared.model_files.named import model_dir
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
    write_qwen,
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
    write_directory(path, directory, generation=generation)
    (directory / "model.gguf").symlink_to(path)
    return directory


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    """By the checkpoint's names, in float32."""
    return expanded_weights(GgufWeights(directory))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def from_directory(directory: Path) -> Any:
    config: Any = AutoConfig.from_pretrained(directory)
    make: Any = AutoModelForCausalLM
    model = make.from_config(config, dtype=torch.float32)
    found = model.load_state_dict(weights_of(directory), strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
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
    found = weights_of(expanded(tmp_path / "m.gguf", tmp_path / "made"))
    assert set(found) == set(stored)
    for name, values in stored.items():
        assert np.array_equal(found[name].numpy(), values), name


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


@pytest.mark.parametrize(
    ("model", "config"), [(Qwen2ForCausalLM, Qwen2Config), (Qwen3ForCausalLM, Qwen3Config)]
)
def test_a_qwen_is_what_it_was(tmp_path: Path, model: Any, config: Any) -> None:
    torch.manual_seed(6)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    made = config(vocab_size=len(SMOLLM_TOKENS), **sizes, **heads, tie_word_embeddings=True)
    original = model(made).eval()
    for weight in original.parameters():
        if weight.dim() == 1:
            # Biases and norms that all tell apart.
            weight.data += torch.rand(weight.shape)
    write_qwen(tmp_path / "m.gguf", original)
    directory = expanded(tmp_path / "m.gguf", tmp_path / "made")
    assert torch.equal(logits(from_directory(directory)), logits(original))
    _, ours = load_model_config(directory)
    assert ours.model_type == original.config.model_type and ours.head_dim == 16


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_expanded_as_by_the_package_gguf(kind: str) -> None:
    """Random bytes, with scales that are numbers."""
    blocks, of_gguf = KINDS[kind], gguf.GGMLQuantizationType[kind]
    assert gguf.GGML_QUANT_SIZES[of_gguf] == (blocks.size, blocks.num_bytes)
    data = np.random.default_rng(1).integers(0, 256, (64, blocks.num_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(data, of_gguf)
    are_numbers = np.isfinite(expected).all(axis=1)
    assert are_numbers.sum() > 40
    codes, scale, offset = blocks.take(torch.from_numpy(data[are_numbers]))
    assert scale.shape[1] == blocks.size // blocks.run
    weight = QuantisedWeight(codes, scale, blocks.num_bits, offset=offset)
    assert np.array_equal(weight.expand(torch.float32).numpy(), expected[are_numbers])


def test_words_of_other_tokenizers_are_those_of_transformers(tmp_path: Path) -> None:
    texts = [*TEXTS, "It's 1234567 o'clock\n\n  I'LL   go!?\r\n\tnow  é"]
    pattern = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(SMOLLM_TOKENS),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )
    for pre, words in (("llama-bpe", pattern), ("qwen2", pattern.replace("{1,3}", ""))):
        write_qwen(tmp_path / f"{pre}.gguf", model, pre=pre)
        made = read_vocabulary(GgufFile(tmp_path / f"{pre}.gguf")).tokenizer
        split = pre_tokenizers.Split(Regex(words), "isolated")
        for text in texts:
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            both = pre_tokenizers.Sequence([split, byte_level])
            assert made.pre_tokenizer.pre_tokenize_str(text) == both.pre_tokenize_str(text)


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
        ({"metadata": {"llama.expert_count": 8}}, "llama.expert_count: is not read"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type: is not"),
        (
            {"metadata": {"llama.rope.dimension_count": 16}},
            "llama.rope.dimension_count: must be 32",
        ),
        (
            {"metadata": {"tokenizer.ggml.pre": "falcon"}},
            "tokenizer.ggml.pre: tokenizers of kind gpt2 falcon are not read",
        ),
        ({"metadata": {"tokenizer.ggml.add_eos_token": True}}, "add_eos_token: is not read"),
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
    with pytest.raises(ModelError) as caught:
        GgufWeights(expanded(tmp_path / "m.gguf", tmp_path / "made")).read(
            "model.norm.weight", (96,), torch.device("cpu")
        )
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 3, 4, 40, 3000, -100])
def test_a_file_that_is_cut_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "m.gguf"
    write_llama(path, llama())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match="m.gguf: not a whole GGUF file") as caught:
        expanded(path, tmp_path / "made")
    if kept not in (0, 3, 4):
        size = path.stat().st_size
        told = re.search(r"it ends at byte (\d+), and (\d+) are needed", str(caught.value))
        assert told is not None and int(told[1]) == size < int(told[2])


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    write_llama(tmp_path / "m.gguf", llama())
    (tmp_path / "made" / name).mkdir(parents=True)
    with pytest.raises((ModelError, OSError), match=f"{name}.*Is a directory|Is a.*{name}"):
        write_directory(tmp_path / "m.gguf", tmp_path / "made", generation={})


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_llama(path, llama())
    path.write_bytes(path.read_bytes().replace(b"llama", b"lhama", 2))
    with pytest.raises(ModelError, match="general.architecture: 'lhama' is not one of"):
        expanded(path, tmp_path / "made")


def test_a_file_is_a_model_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once, and anew when the file has changed; called as the file is."""
    monkeypatch.setenv("BATON_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "toy.Q4.gguf"
    write_llama(path, llama())
    directory = model_dir(str(path))
    assert directory.is_relative_to(tmp_path / "cache" / "gguf") and directory.name == "toy.Q4"
    made = (directory / "config.json").stat().st_mtime_ns
    assert model_dir(str(path)) == directory
    assert (directory / "config.json").stat().st_mtime_ns == made
    assert not list(directory.parent.glob(".*"))
    write_llama(path, llama(tied=False))
    assert model_dir(str(path)) != directory
    for bad, words in ((tmp_path / "none.gguf", "No such file"), (tmp_path / "bad.gguf", "whole")):
        if "bad" in bad.name:
            bad.write_bytes(b"GGUF")
        with pytest.raises(ArgumentTypeError, match=words):
            model_dir(str(bad))
    with pytest.raises(ModelError, match="cache folder, which BATON_CACHE_DIR names"):
        directory_of(path, path)


def test_a_file_is_served_as_its_expanded_form(
    tmp_path: Path,
) -> None:
    """To the bit, on the path that is exact."""
    kinds = {"token_embd": Q8_0, "attn_q": Q4_1, "attn_k": Q4_1, "ffn_up": Q8_0, "ffn_norm": F32}
    torch.manual_seed(4)
    write_llama(tmp_path / "m.gguf", llama(), kinds=kinds)
    directory = expanded(tmp_path / "m.gguf", tmp_path / "made")
    plain = shutil.copytree(directory, tmp_path / "plain")
    (plain / "model.gguf").unlink()
    save_file(
        {name: each.contiguous() for name, each in weights_of(directory).items()},
        plain / "model.safetensors",
    )
    row = Batch([BatchRow([3, 4, 5, 6], 0, [[0]])])
    both = [
        ModelRunner(EngineConfig(each, num_blocks=8, device="cpu")).logits(row)
        for each in (directory, plain)
    ]
    assert torch.equal(*both)
