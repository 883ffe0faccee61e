"""Tokenizers in other forms than tokenizer.json: converted, or one warning that names the file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

from baton.services.gateway.tokenizer import StreamDecoder, TextCodec
from tests.unit.gateway.conftest import CORPUS

TEXTS = [
    "In the beginning was the word, and the word was with the baton.",
    "Le relais passe le témoin; où ça?",
    "日本語 é ☃ 🏃 12345 3.14",
    "a\nb\t c   d",
    "",
    "x",
]
TRAINERS: dict[str, dict[str, Any]] = {
    # As llama's.
    "bpe with bytes": {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
    },
    # As gemma's.
    "bpe without a space in front": {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<turn>", "\n\n"],
    },
    "bpe": {"model_type": "bpe", "vocab_size": 300, "user_defined_symbols": ["<sep>"]},
    "unigram": {"model_type": "unigram", "vocab_size": 300},
    "unigram with bytes": {"model_type": "unigram", "vocab_size": 500, "byte_fallback": True},
}

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A model directory whose tokenizer is a sentencepiece model and nothing else."""
    trained: dict[str, bytes] = {}

    def make(name: str, **config: Any) -> Path:
        directory: Path = tmp_path_factory.mktemp("spm")
        if name not in trained:
            corpus = directory / "corpus"
            corpus.write_text("\n".join(CORPUS))
            sentencepiece.SentencePieceTrainer.train(
                input=str(corpus),
                model_prefix=str(directory / "tokenizer"),
                hard_vocab_limit=False,
                minloglevel=2,
                **TRAINERS[name],
            )
            trained[name] = (directory / "tokenizer.model").read_bytes()
            (directory / "tokenizer.vocab").unlink()
        (directory / "tokenizer.model").write_bytes(trained[name])
        (directory / "config.json").write_text('{"model_type": "llama"}')
        if config:
            (directory / "tokenizer_config.json").write_text(json.dumps(config))
        return directory

    return make


def load(model_dir: Path) -> TextCodec:
    codec = TextCodec.load(model_dir)
    assert codec is not None
    return codec


@pytest.mark.parametrize("name", TRAINERS)
def test_ids_and_text_are_those_of_sentencepiece(make: Make, name: str) -> None:
    model_dir = make(name)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model_dir / "tokenizer.model"))
    ours = load(model_dir)
    for text in TEXTS:
        token_ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == token_ids
        assert ours.encode(text) == [theirs.bos_id(), *token_ids]
        known = [token_id for token_id in token_ids if token_id != theirs.unk_id()]
        assert ours.decode(known) == theirs.decode(known)
        decoder = StreamDecoder(ours, ())
        pieces = [decoder.push([token_id]).text for token_id in known]
        assert "".join(pieces) + decoder.finish() == theirs.decode(known)
    assert ours.eos_token_id == theirs.eos_id()
    assert ours.encode("x</s>", add_special_tokens=False)[-1] == theirs.eos_id()


def test_ids_are_those_of_transformers(make: Make) -> None:
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "eos_token": "<|end|>"}
    added = {"content": "<|end|>", "special": True}
    for legacy in (False, True):
        decoder = {"420": {**added, "normalized": False}}
        model_dir = make("bpe with bytes", **config, legacy=legacy, added_tokens_decoder=decoder)
        ours, theirs = load(model_dir), AutoTokenizer.from_pretrained(model_dir)
        assert ours.eos_token_id == theirs.eos_token_id
        for text in [*TEXTS, "<s>[ask] who<|end|>it<|end|> was</s>"]:
            assert ours.encode(text) == theirs(text).input_ids


def test_files_say_what_goes_around_a_prompt(make: Make) -> None:
    bos, eos = 1, 2
    plain = load(make("bpe")).encode("the word", add_special_tokens=False)
    both = load(make("bpe", add_bos_token=True, add_eos_token=True))
    assert both.encode("the word") == [bos, *plain, eos]
    assert load(make("bpe", add_bos_token=False)).encode("the word") == plain


@pytest.mark.parametrize("named", ["GPT2Tokenizer", "Qwen2TokenizerFast"])
def test_a_vocabulary_and_its_merges(tmp_path: Path, named: str) -> None:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    trained.model.save(str(tmp_path))
    config = {
        "tokenizer_class": named,
        "added_tokens_decoder": {
            "400": {"content": "<|im_end|>", "special": True, "normalized": False}
        },
        "eos_token": "<|im_end|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    ours, theirs = load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eos_token_id == theirs.eos_token_id == 400
    for text in [*TEXTS, "It's <|im_end|>e\u0301 <|endoftext|>!"]:
        assert ours.encode(text) == theirs(text).input_ids
        assert ours.decode(theirs(text).input_ids) == theirs.decode(
            theirs(text).input_ids, skip_special_tokens=True
        )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", b"IQ== 0\nIg== 1\n"),
        ("tokenizer.model", b""),
        ("spiece.model", b"\xff\xff"),
        ("tekken.json", b"{}"),
        ("vocab.json", b"{}"),
        ("vocab.txt", b"a\nb\n"),
    ],
)
def test_what_cannot_be_converted_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    assert TextCodec.load(tmp_path) is None
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert str(tmp_path / name) in str(record.__dict__)


def test_without_the_package_a_sentencepiece_model_is_one_warning(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model_dir = make("bpe")
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    assert TextCodec.load(model_dir) is None
    [record] = caplog.records
    assert "sentencepiece" in str(record.__dict__) and "tokenizer.model" in str(record.__dict__)


def test_a_tokenizer_json_goes_before_all_others(make: Make, byte_level: TextCodec) -> None:
    model_dir = make("bpe")
    tokenizer = Tokenizer(models.WordLevel({"only": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.save(str(model_dir / "tokenizer.json"))
    assert load(model_dir).encode("only") == [0]
