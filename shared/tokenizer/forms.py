"""Tokenizers in other forms than tokenizer.json, as far as what is installed can convert them.

A sentencepiece model (needs the package of that name), and vocab.json with merges.txt where the
files name a class that we know.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    processors,
)

from baton.shared.telemetry import log_event
from baton.shared.tokenizer.classes import (
    put_together,
    space_steps,
    tokenizer_class,
)

logger = logging.getLogger(__name__)

_PATTERNS = (
    *("*.model", "*.model.v*", "vocab.json", "tekken.json", "*.tiktoken", "vocab.txt"),
    *("tokenizer.*.json", "*.spm", "*.vocab"),
)


class Converted(NamedTuple):
    path: Path
    tokenizer: Tokenizer
    special_tokens: Mapping[str, str]
    """Those that the file itself names; files beside go before it."""
    adds_tokens_of: Mapping[str, bool] | None
    """Of a prompt: the defaults of `put_around`; None for a tokenizer that does it by itself."""


class _NotConverted(Exception):
    """Why, in one line."""


def convert_other_form(
    model_dir: Path, config: Mapping[str, Any], model_config: Mapping[str, Any]
) -> Converted | None:
    """None when there is none that can be converted: the log then says which file, and why.

    `config`: what tokenizer_config.json holds; `model_config`: config.json.
    """
    found = (path for pattern in _PATTERNS for path in sorted(model_dir.glob(pattern)))
    path = next(found, None)
    if path is None:
        return None
    try:
        if path.suffix == ".model":
            return _from_sentencepiece(path, config)
        if path.name == "vocab.json":
            return _from_vocab_and_merges(path, config, model_config)
        raise _NotConverted("a form that is not supported")
    except Exception as error:  # of files and libraries of any kind
        log_event(
            logger,
            logging.WARNING,
            "the tokenizer cannot be used, only token ids are served",
            file=str(path),
            message=" ".join(str(error).split()),
        )
        return None


_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_UNIGRAM, _BPE = 1, 2


def _from_sentencepiece(path: Path, config: Mapping[str, Any]) -> Converted:
    try:
        messages = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError:
        raise _NotConverted("needs the package sentencepiece, or a tokenizer.json") from None
    proto = messages.ModelProto()
    proto.ParseFromString(path.read_bytes())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if not proto.pieces:
        raise _NotConverted("is no sentencepiece model")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise _NotConverted("treats whitespace in a way that is not supported")
    kinds: dict[int, Callable[[Any], models.Model]] = {_UNIGRAM: _unigram, _BPE: _bpe}
    if trainer.model_type not in kinds:
        raise _NotConverted(f"is of type {trainer.model_type}: only unigram and bpe are supported")

    tokenizer = Tokenizer(kinds[trainer.model_type](proto))
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
            for piece in proto.pieces
            if piece.type in (_CONTROL, _USER_DEFINED)
        ]
    )
    steps: list[normalizers.Normalizer] = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    adds_space = config.get("add_prefix_space")
    tokenizer.pre_tokenizer, tokenizer.decoder = space_steps(
        begins_with_space=normalizer.add_dummy_prefix if adds_space is None else bool(adds_space),
        is_legacy=bool(config.get("legacy")),
    )
    names = ("unk", "bos", "eos", "pad")
    special_tokens = {
        f"{name}_token": proto.pieces[getattr(trainer, f"{name}_id")].piece
        for name in names
        if getattr(trainer, f"{name}_id") >= 0
    }
    return Converted(path, tokenizer, special_tokens, {"add_bos_token": True})


def put_around(
    tokenizer: Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Has the tokenizer put the start and end token around a prompt, as `add_bos_token` and
    `add_eos_token` of `config` say."""
    bos, eos = special_tokens.get("bos_token"), special_tokens.get("eos_token")
    around = ["$A"]
    if bos is not None and config.get("add_bos_token"):
        around.insert(0, bos)
    if eos is not None and config.get("add_eos_token"):
        around.append(eos)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around,
        special_tokens=[(text, tokenizer.token_to_id(text)) for text in around if text != "$A"],
    )


def _unigram(proto: Any) -> models.Model:
    return models.Unigram(
        [(piece.piece, piece.score) for piece in proto.pieces],
        unk_id=proto.trainer_spec.unk_id,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _bpe(proto: Any) -> models.Model:
    """sentencepiece joins the two neighbours that make the piece of the highest score."""
    ids = {piece.piece: token_id for token_id, piece in enumerate(proto.pieces)}
    joined = {
        piece.piece: piece.score
        for piece in proto.pieces
        if piece.type in (_NORMAL, _USER_DEFINED, _UNUSED)
    }
    ranked = sorted(joined, key=lambda text: (-joined[text], ids[text]))
    merges = [
        (text[:cut], text[cut:])
        for text in ranked
        for cut in range(1, len(text))
        if text[:cut] in joined and text[cut:] in joined
    ]
    return models.BPE(
        ids,
        merges,
        unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _from_vocab_and_merges(
    path: Path, config: Mapping[str, Any], model_config: Mapping[str, Any]
) -> Converted:
    merges = path.with_name("merges.txt")
    if not merges.exists():
        raise _NotConverted("needs merges.txt beside it")
    name = tokenizer_class(config.get("tokenizer_class"), model_config, is_byte_level=True)
    tokenizer = Tokenizer(models.BPE.from_file(str(path), str(merges)))
    if not put_together(name, tokenizer, config):
        raise _NotConverted("needs a tokenizer_class that we know, or a tokenizer.json")
    return Converted(path, tokenizer, {}, {})
