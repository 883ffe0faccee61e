"""Tokens that files beside tokenizer.json add, and special ones by name: as in transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from baton.shared.model_files.fields import ModelError
from baton.shared.tokenizer.classes import _GENERIC, CLASS_OF_MODEL_TYPE, DEFAULTS
from baton.shared.tokenizer.files import load_tokenizer

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
END = "<|im_end|>"
NEXT_ID = 500
"""Of the first token that is added to the byte-level tokenizer here."""


def added(content: str, **flags: bool) -> dict[str, Any]:
    return {
        "content": content,
        **dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False),
        "special": True,
        **flags,
    }


FILES: dict[str, dict[str, Any]] = {
    "nothing beside": {},
    "names only": {CONFIG: {**FAST, "bos_token": "<s>", "eos_token": "</s>"}},
    "a null name": {CONFIG: {**FAST, "bos_token": None, "eos_token": "</s>"}},
    "names as objects": {
        CONFIG: {**FAST, "eos_token": {"__type": "AddedToken", **added("</s>")}},
    },
    "a name for a word of the vocabulary": {CONFIG: {**FAST, "eos_token": "the"}},
    "a name for a new token": {CONFIG: {**FAST, "eos_token": END, "pad_token": END}},
    "names of one's own": {CONFIG: {**FAST, "image_token": "<pic>", "add_bos_token": True}},
    "extra tokens": {CONFIG: {**FAST, "extra_special_tokens": ["<x>", "</s>", "<y>"]}},
    "extra tokens with names": {
        CONFIG: {**FAST, "extra_special_tokens": {"boi_token": "<boi>", "eoi_token": "</s>"}}
    },
    "extra tokens by their old name": {
        CONFIG: {**FAST, "additional_special_tokens": ["<x>", "<y>"]}
    },
    "a map beside": {
        CONFIG: {**FAST, "eos_token": "</s>"},
        MAP: {"bos_token": "<s>", "unk_token": added("<unk>"), "pad_token": "<pad>"},
    },
    "a map that contradicts": {
        CONFIG: {**FAST, "eos_token": "</s>"},
        MAP: {"eos_token": END, "additional_special_tokens": ["<x>"]},
    },
    "a map that does not count": {
        CONFIG: {**FAST, "eos_token": "</s>", "added_tokens_decoder": {"0": added("<s>")}},
        MAP: {"eos_token": END, "pad_token": "<pad>"},
        ADDED: {"<z>": 700},
    },
    "added tokens": {CONFIG: FAST, ADDED: {"<|b|>": NEXT_ID + 1, "<|a|>": NEXT_ID}},
    "added tokens, one of them special": {
        CONFIG: FAST,
        ADDED: {END: NEXT_ID, "<|a|>": NEXT_ID + 1},
        MAP: {"eos_token": END, "additional_special_tokens": ["<s>"]},
    },
    "added tokens without a configuration": {ADDED: {"<|a|>": NEXT_ID}},
    "added tokens that are there already": {CONFIG: FAST, ADDED: {"</s>": 1, "日本語": 498}},
    "a list of added tokens": {
        CONFIG: {
            **FAST,
            "eos_token": END,
            "added_tokens_decoder": {
                "0": added("<s>"),
                str(NEXT_ID + 1): added("<|tool|>", special=False),
                str(NEXT_ID): added(END),
            },
        }
    },
    "a list with other flags": {
        CONFIG: {
            **FAST,
            "eos_token": "</s>",
            "added_tokens_decoder": {
                "1": added("</s>", special=False, lstrip=True),
                "498": added("日本語"),
                "168": added("é", rstrip=True, special=False),
            },
        }
    },
}


@pytest.fixture
def write(tmp_path: Path, tokenizers_by_kind: dict[str, Tokenizer]) -> Any:
    def write(files: Mapping[str, Any], kind: str = "byte_level") -> Path:
        tokenizers_by_kind[kind].save(str(tmp_path / "tokenizer.json"))
        for name, content in {"config.json": {"model_type": "llama"}, **files}.items():
            (tmp_path / name).write_text(json.dumps(content))
        return tmp_path

    return write


@pytest.mark.parametrize("name", FILES)
def test_tokens_are_those_of_transformers(write: Any, name: str) -> None:
    model_dir = write(FILES[name])
    ours, theirs = load_tokenizer(model_dir), AutoTokenizer.from_pretrained(model_dir)
    assert ours is not None
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.eos_token_id == theirs.eos_token_id
    known = theirs.backend_tokenizer.get_added_tokens_decoder()
    mine = ours.tokenizer.get_added_tokens_decoder()
    assert {i: repr(token) for i, token in mine.items()} == {i: repr(t) for i, t in known.items()}
    words = [token.content for token in known.values()] + ["the word", " ", "\n", "é日本語"]
    for text in ("".join(words), " ".join(words), " \n".join(reversed(words))):
        assert ours.tokenizer.encode(text).ids == theirs(text).input_ids
        ids = ours.tokenizer.encode(text).ids
        assert ours.tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        # Ids that the tokenizer cannot give.
        (ADDED, {"<|a|>": NEXT_ID + 7}),
        (CONFIG, {"added_tokens_decoder": {str(NEXT_ID + 7): added("<|a|>")}}),
        (ADDED, {"the": 3}),
        # What is no token.
        (ADDED, {"<|a|>": "x"}),
        (ADDED, []),
        (MAP, {"bos_token": 5}),
        (MAP, {"additional_special_tokens": [5]}),
        (CONFIG, {"added_tokens_decoder": {"5": {"text": "x"}}}),
        (CONFIG, {"added_tokens_decoder": ["<|a|>"]}),
        (CONFIG, {"eos_token": ["</s>"]}),
    ],
)
def test_what_cannot_be_is_refused_by_its_file(write: Any, name: str, content: object) -> None:
    model_dir = write({name: content})
    with pytest.raises(ModelError) as raised:
        load_tokenizer(model_dir)
    assert str(model_dir / name) in str(raised.value) and "\n" not in str(raised.value)


def test_a_pad_token_may_come_with_the_tokenizers_padding(
    tmp_path: Path, tokenizers_by_kind: dict[str, Tokenizer]
) -> None:
    tokenizer = Tokenizer.from_str(tokenizers_by_kind["byte_level"].to_str())
    tokenizer.enable_padding(pad_id=1, pad_token="</s>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    ours = load_tokenizer(tmp_path)
    assert ours is not None
    assert ours.special_tokens == AutoTokenizer.from_pretrained(tmp_path).special_tokens_map


@pytest.mark.parametrize(
    ("kind", "config", "model"),
    [
        ("byte_fallback", {"tokenizer_class": "LlamaTokenizer"}, {"model_type": "llama"}),
        ("byte_fallback", {"tokenizer_class": "LlamaTokenizerFast"}, {"model_type": "llama"}),
        ("byte_level", {"tokenizer_class": "LlamaTokenizer"}, {"model_type": "llama"}),
        ("byte_fallback", {"tokenizer_class": "LlamaTokenizer"}, {"model_type": "mistral"}),
        ("byte_level", {"tokenizer_class": "GPT2Tokenizer"}, {"model_type": "llama"}),
        ("byte_level", {"tokenizer_class": "Qwen2Tokenizer"}, {"model_type": "llama"}),
        ("byte_level", {"tokenizer_class": "Qwen2Tokenizer", "eos_token": None}, {}),
        ("byte_level", {"bos_token": "<s>"}, {"model_type": "qwen2"}),
        ("byte_level", {"tokenizer_class": "NoSuchTokenizer"}, {"model_type": "llama"}),
        ("byte_level", {}, {"model_type": "llama", "tokenizer_class": "GPT2Tokenizer"}),
        ("byte_level", {"tokenizer_class": "GPT2TokenizerFast", "pad_token": "<p>"}, {}),
        ("byte_fallback", {"tokenizer_class": "GemmaTokenizer"}, {"model_type": "llama"}),
    ],
)
def test_a_class_brings_names_of_its_own(
    write: Any, kind: str, config: dict[str, Any], model: dict[str, Any]
) -> None:
    files = {CONFIG: config, "config.json": {"model_type": "llama", **model}}
    model_dir = write(files, kind)
    ours, theirs = load_tokenizer(model_dir), AutoTokenizer.from_pretrained(model_dir)
    assert ours is not None
    assert ours.special_tokens == theirs.special_tokens_map


def test_the_table_of_classes_is_that_of_transformers() -> None:
    import transformers

    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
    for name, defaults in DEFAULTS.items():
        special_tokens_map = getattr(transformers, name)().special_tokens_map
        known = {
            key: special_tokens_map[key]
            for key in (*names, "mask_token")
            if key in special_tokens_map
        }
        assert known == dict(defaults), name
    for model_type, name in CLASS_OF_MODEL_TYPE.items():
        registered = TOKENIZER_MAPPING_NAMES[model_type]
        assert registered in (name, "MistralCommonBackend" if name == _GENERIC else name)
    wrong = MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS & CLASS_OF_MODEL_TYPE.keys()
    assert {t for t in wrong if CLASS_OF_MODEL_TYPE[t] != _GENERIC} == {"qwen2"}


@pytest.mark.parametrize("legacy", [None, False, True])
@pytest.mark.parametrize("add_prefix_space", [None, False, True])
def test_llamas_class_puts_its_own_steps_around_the_model(
    write: Any, legacy: bool | None, add_prefix_space: bool | None
) -> None:
    """Where the text after a special token begins is not what tokenizer.json says."""
    given = {"legacy": legacy, "add_prefix_space": add_prefix_space}
    config = {key: value for key, value in given.items() if value is not None}
    model_dir = write({CONFIG: {"tokenizer_class": "LlamaTokenizer", **config}}, "byte_fallback")
    ours, theirs = load_tokenizer(model_dir), AutoTokenizer.from_pretrained(model_dir)
    assert ours is not None
    for text in ("the word", "<s>the word</s> the", "  two ☃\n", "<s> <s>日本"):
        ids = ours.tokenizer.encode(text).ids
        assert ids == theirs(text).input_ids
        assert ours.tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_path_need_not_be_utf_8(tmp_path: Path, tokenizers_by_kind: dict[str, Tokenizer]) -> None:
    model_dir = tmp_path / os.fsdecode(b"m\xf6del")
    model_dir.mkdir()
    written = tokenizers_by_kind["byte_level"].to_str()
    (model_dir / "tokenizer.json").write_text(written, encoding="utf-8")
    assert load_tokenizer(model_dir) is not None
