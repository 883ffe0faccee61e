"""Tiny tokenizers of the kinds that model directories bring, trained here, loaded as they are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn.server
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordLevelTrainer, WordPieceTrainer

from baton.services.gateway.tokenizer import TextCodec

CORPUS = [
    "In the beginning was the word, and the word was with the baton.",
    "Le relais passe le témoin à l'été; où ça? Là-bas, près de la forêt.",
    "Пока живёт слово, живёт и память о нём.",
    "日本語の文章も少しあります。日本は島国です。",
    "Emoji 🏃🏽‍♀️💨 and 👩‍👩‍👧 join hands; naïve façade, Ω≈ç√∫.",
    "def hand_off(self):\n    return self.blocks  # two    spaces\tand tabs",
] * 20
SPECIAL = ["<s>", "</s>", "<unk>"]


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Added tokens are written as themselves: with characters outside of the byte alphabet, with
    # one that looks like a byte, and with a space.
    tokenizer.add_tokens([AddedToken(text) for text in ("日本語", "é", "hello world")])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def _metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = UnigramTrainer(
        vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _byte_fallback() -> Tokenizer:
    """As sentencepiece models with byte fallback are converted."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizer
    trainer = BpeTrainer(
        vocab_size=200, special_tokens=SPECIAL, limit_alphabet=60, show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    merges = [(left, right) for left, right in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _no_decoder() -> Tokenizer:
    """Tokens are words, put together with blanks."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": _byte_level,
    "metaspace": _metaspace,
    "byte_fallback": _byte_fallback,
    "word_piece": _word_piece,
    "no_decoder": _no_decoder,
}


@pytest.fixture(autouse=True, scope="session")
def servers_that_stop_at_once() -> Iterator[None]:
    """uvicorn looks ten times a second whether it should stop, and then sleeps a tenth: at the end
    of hundreds of tests."""

    async def sleep(delay_s: float) -> None:
        await asyncio.sleep(delay_s / 20)

    with pytest.MonkeyPatch.context() as patch:
        quick = SimpleNamespace(**{**vars(asyncio), "sleep": sleep})
        patch.setattr(uvicorn.server, "asyncio", quick)
        yield


@pytest.fixture(scope="session")
def tokenizers_by_kind() -> dict[str, Tokenizer]:
    return {kind: make() for kind, make in KINDS.items()}


@pytest.fixture(scope="session")
def codecs_by_kind(
    tokenizers_by_kind: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, TextCodec]]:
    codecs = {}
    for kind, tokenizer in tokenizers_by_kind.items():
        model_dir = tmp_path_factory.mktemp(kind)
        tokenizer.save(str(model_dir / "tokenizer.json"))
        codec = TextCodec.load(model_dir)
        assert codec is not None
        codecs[kind] = codec
    yield codecs
    for codec in codecs.values():
        codec.close()


@pytest.fixture(scope="session")
def byte_level(codecs_by_kind: dict[str, TextCodec]) -> TextCodec:
    return codecs_by_kind["byte_level"]


@pytest.fixture(scope="session")
def byte_fallback(codecs_by_kind: dict[str, TextCodec]) -> TextCodec:
    return codecs_by_kind["byte_fallback"]


@pytest.fixture
def model_dir(tmp_path: Path, tokenizers_by_kind: dict[str, Tokenizer]) -> Path:
    """A directory with a byte-level tokenizer.json; tests put further files beside it."""
    tokenizers_by_kind["byte_level"].save(str(tmp_path / "tokenizer.json"))
    return tmp_path
