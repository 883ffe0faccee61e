"""The tokenizer of a GGUF file, as the files that Hugging Face's tokenizers are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from baton.shared.model_files.gguf.file import GgufFile

_PREFIX = "tokenizer.ggml."
_CONTROL, _USER_DEFINED = 3, 4
_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Special tokens: as checkpoints call them → as the file does."""
_BLANK = "▁"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_WORDS = {
    ("gpt2", "llama-bpe"): _SUFFIXES + _LETTERS + r"|\p{N}{1,3}" + _REST,
    ("gpt2", "qwen2"): _SUFFIXES + _LETTERS + r"|\p{N}" + _REST,
}
"""What is a word, by the kind of tokenizer."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    tokenizer: Tokenizer
    config: dict[str, Any]
    """Of tokenizer_config.json."""
    token_ids: dict[str, int]
    """`bos_token_id` and the like."""

    @property
    def size(self) -> int:
        return self.tokenizer.get_vocab_size()


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """Raises ModelError for a tokenizer of another kind than those that are known here."""
    tokens = file.strings(_PREFIX + "tokens")
    kind = file.string(_PREFIX + "model"), file.string(_PREFIX + "pre", "default")
    if file.boolean(_PREFIX + "add_space_prefix", False):
        raise file.error(_PREFIX + "add_space_prefix", "is not read")
    if file.boolean(_PREFIX + "add_eos_token", False):
        raise file.error(_PREFIX + "add_eos_token", "is not read")
    if kind == ("gpt2", "smollm"):
        tokenizer = _smollm(file, tokens)
    elif kind in _WORDS:
        tokenizer = _by_words(file, tokens, _WORDS[kind])
    elif kind == ("llama", "default") and file.string("general.architecture") == "gemma3":
        tokens = [_BLANK * len(token) if not token.strip(" ") else token for token in tokens]
        tokenizer = _gemma(file, tokens)
    else:
        raise file.error(_PREFIX + "pre", f"tokenizers of kind {' '.join(kind)} are not read")
    token_ids = {
        f"{name}_token_id": file.integer(f"{_PREFIX}{theirs}_token_id")
        for name, theirs in _NAMES.items()
        if file.has(f"{_PREFIX}{theirs}_token_id")
    }
    for name, token_id in token_ids.items():
        if token_id >= len(tokens):
            key = f"{_PREFIX}{_NAMES[name.removesuffix('_token_id')]}_token_id"
            raise file.error(key, f"{token_id} is no token of {len(tokens)}")
    _add_tokens(file, tokenizer, tokens)
    if file.boolean(_PREFIX + "add_bos_token", False):
        _begin_with(file, tokenizer, tokens, token_ids)
    config: dict[str, Any] = {
        # What is in tokenizer.json, and nothing that a class does by itself.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name.removesuffix("_id"): tokens[each] for name, each in token_ids.items()},
    }
    if file.has("tokenizer.chat_template"):
        config["chat_template"] = file.string("tokenizer.chat_template")
    return Vocabulary(tokenizer, config, token_ids)


def _smollm(file: GgufFile, tokens: list[str]) -> Tokenizer:
    """Bytes written as letters; digits one by one, then GPT-2's words, as llama.cpp splits them.

    transformers reads such a file without the digits: of "  12" it makes other tokens.
    """
    merges = [tuple(merge.split(" ")) for merge in file.strings(_PREFIX + "merges")]
    tokenizer = _bpe(file, tokens, merges)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _by_words(file: GgufFile, tokens: list[str], words: str) -> Tokenizer:
    """Bytes written as letters, within the words of a pattern; words that are tokens stay whole."""
    merges = [tuple(merge.split(" ")) for merge in file.strings(_PREFIX + "merges")]
    is_llama = file.string(_PREFIX + "pre") == "llama-bpe"
    tokenizer = _bpe(file, tokens, merges, ignore_merges=is_llama)
    if not is_llama:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gemma(file: GgufFile, tokens: list[str]) -> Tokenizer:
    """A sentencepiece model of type BPE: what has no token is written in bytes.

    The file has no merges. They follow from the vocabulary: whatever two tokens are a third, those
    that come first go first.
    """
    known = set(tokens)
    merges = [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in known and token[cut:] in known
    ]
    unknown = tokens[file.integer(_PREFIX + "unknown_token_id")]
    tokenizer = _bpe(file, tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer.normalizer = normalizers.Replace(" ", _BLANK)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _bpe(file: GgufFile, tokens: list[str], merges: list[Any], **options: Any) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise file.error(_PREFIX + "tokens", "a token stands there twice")
    try:
        return Tokenizer(models.BPE(vocabulary, merges, **options))
    except Exception as error:  # the library has none of its own
        raise file.error(_PREFIX + "merges", str(error)) from None


def _add_tokens(file: GgufFile, tokenizer: Tokenizer, tokens: list[str]) -> None:
    """Those that are found whole in a text, whatever stands around them."""
    kinds = file.integers(_PREFIX + "token_type")
    if len(kinds) != len(tokens):
        raise file.error(_PREFIX + "token_type", f"has {len(kinds)} entries for {len(tokens)}")
    by_kind: dict[int, list[str]] = {_CONTROL: [], _USER_DEFINED: []}
    for token, kind in zip(tokens, kinds, strict=True):
        by_kind.get(kind, []).append(token)
    special = by_kind[_CONTROL]
    tokenizer.add_special_tokens([AddedToken(each, normalized=False) for each in special])
    tokenizer.add_tokens([AddedToken(each, normalized=False) for each in by_kind[_USER_DEFINED]])


def _begin_with(
    file: GgufFile, tokenizer: Tokenizer, tokens: list[str], token_ids: dict[str, int]
) -> None:
    if "bos_token_id" not in token_ids:
        raise file.error(_PREFIX + "add_bos_token", "there is no such token")
    bos_id = token_ids["bos_token_id"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokens[bos_id]} $A", special_tokens=[(tokens[bos_id], bos_id)]
    )
