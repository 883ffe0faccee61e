"""A tokenizer out of the files of a model directory, put together as transformers does it.

tokenizer.json is the tokenizer. Files beside it may name the special tokens and add others:
tokenizer_config.json; and where that has no `added_tokens_decoder`, the older files
special_tokens_map.json, which then goes before it, and added_tokens.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from baton.shared.model_files import fields
from baton.shared.model_files.fields import ModelError
from baton.shared.tokenizer.classes import DEFAULTS, put_together, tokenizer_class
from baton.shared.tokenizer.forms import Converted, convert_other_form, put_around

STANDARD_NAMES = (
    *("bos_token", "eos_token", "unk_token", "sep_token"),
    *("pad_token", "cls_token", "mask_token"),
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

_Token = str | AddedToken
"""`str` of either is what the token is written as."""


@dataclass(frozen=True)
class TokenizerFiles:
    path: Path
    """Of the tokenizer itself."""
    tokenizer: Tokenizer
    special_tokens: Mapping[str, str]
    """By the name that templates use: `bos_token`; only those that the model has."""

    @property
    def eos_token_id(self) -> int | None:
        token_id: int | None = self.tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        return token_id


def load_tokenizer(model_dir: Path) -> TokenizerFiles | None:
    """None without a tokenizer; ModelError, naming the file, when one cannot be used."""
    config = read_json_object(model_dir / "tokenizer_config.json")
    model_config = read_json_object(model_dir / "config.json")
    found = _from_json(model_dir / "tokenizer.json")
    found = found or convert_other_form(model_dir, config, model_config)
    if found is None:
        return None
    tokenizer = found.tokenizer
    name = tokenizer_class(
        config.get("tokenizer_class"), model_config, is_byte_level=_is_byte_level(tokenizer)
    )
    if found.adds_tokens_of is None and isinstance(tokenizer.model, BPE):
        put_together(name, tokenizer, config)
    defaults = {**found.special_tokens, **DEFAULTS.get(name, {})}
    beside = _Beside.read(model_dir, config, defaults, tokenizer)
    beside.add_to(tokenizer)
    special_tokens = {name: str(token) for name, token in beside.named.items()}
    if found.adds_tokens_of is not None:
        put_around(tokenizer, {**found.adds_tokens_of, **config}, special_tokens)
    return TokenizerFiles(found.path, tokenizer, special_tokens)


def _from_json(path: Path) -> Converted | None:
    if not path.exists():
        return None
    try:
        # The library takes only paths that are UTF-8.
        tokenizer = Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path}: {one_line(error)}") from error
    padding = tokenizer.padding
    by_itself = {"pad_token": padding["pad_token"]} if padding else {}
    return Converted(path, tokenizer, by_itself, adds_tokens_of=None)


def read_json_object(path: Path) -> dict[str, Any]:
    """Empty without the file. Raises ModelError, naming it."""
    return fields.read_json_object(path) if path.exists() else {}


def step_of(step: Any) -> dict[str, Any] | None:
    """A normalizer, pre-tokenizer, post-processor or decoder as tokenizer.json has it. The whole
    tokenizer as JSON would be seconds of work."""
    return None if step is None else json.loads(step.__getstate__())


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    steps = (tokenizer.pre_tokenizer, tokenizer.post_processor, tokenizer.decoder)
    return any('"ByteLevel"' in json.dumps(step_of(step)) for step in steps)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@dataclass(frozen=True)
class _Beside:
    """The tokens that the files beside a tokenizer tell of."""

    named: Mapping[str, _Token]
    extra: list[_Token]
    """Special ones without a name."""
    by_id: Mapping[int, AddedToken]
    by_id_path: Path

    @classmethod
    def read(
        cls,
        model_dir: Path,
        config: Mapping[str, Any],
        defaults: Mapping[str, str],
        tokenizer: Tokenizer,
    ) -> _Beside:
        """Raises ModelError, naming the file."""
        path = model_dir / "tokenizer_config.json"
        try:
            names, extra = _names(config)
            if "added_tokens_decoder" in config:
                listed = config["added_tokens_decoder"].items()
                by_id = {int(token_id): _added(token) for token_id, token in listed}
            else:
                path = model_dir / "special_tokens_map.json"
                more_names, more_extra = _names(read_json_object(path), are_special=True)
                names, extra = {**names, **more_names}, extra or more_extra
                path = model_dir / "added_tokens.json"
                special = {str(token) for token in [*names.values(), *extra]}
                listed = read_json_object(path).items()
                by_id = {
                    int(token_id): AddedToken(
                        text, normalized=text not in special, special=text in special
                    )
                    for text, token_id in listed
                }
                by_id |= tokenizer.get_added_tokens_decoder()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: a token that cannot be read: {error!r}") from error
        names = {**dict.fromkeys(STANDARD_NAMES), **defaults, **names}
        named = {name: token for name, token in names.items() if token is not None}
        return cls(named, extra, by_id, path)

    def add_to(self, tokenizer: Tokenizer) -> None:
        """Raises ModelError when a token gets another id than the file says."""
        own = list(tokenizer.get_added_tokens_decoder().values())
        # Those that differ in their flags only are added again, which changes these.
        own_tokens = {repr(token) for token in own}
        to_add: list[_Token] = [
            token for _, token in sorted(self.by_id.items()) if repr(token) not in own_tokens
        ]
        known = {str(token) for token in [*own, *to_add]}
        for token in [*self.named.values(), *self.extra]:
            if str(token) not in known:
                known.add(str(token))
                to_add.append(token)
        names = {str(token) for token in self.named.values()}
        tokenizer.add_tokens([_as_special(token, names) for token in to_add])

        of_tokenizer = {str(token) for token in own}
        for token_id, token in self.by_id.items():
            actual = tokenizer.token_to_id(str(token))
            # A token that tokenizer.json adds has the id that it has there.
            if actual != token_id and str(token) not in of_tokenizer:
                raise ModelError(
                    f"{self.by_id_path}: {str(token)!r} has id {token_id}, but added to "
                    f"tokenizer.json it gets {actual}"
                )


def _names(
    values: Mapping[str, Any], *, are_special: bool = False
) -> tuple[dict[str, _Token | None], list[_Token]]:
    """(tokens by name, tokens without one) of one file."""
    named: dict[str, _Token | None] = {}
    for name, value in values.items():
        if name in STANDARD_NAMES:
            named[name] = None if value is None else _token(value, is_special=are_special)
        elif name.endswith("_token") and isinstance(value, str | dict):
            named[name] = _token(value, is_special=are_special)
    extra = values.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= {name: _token(value) for name, value in extra.items()}
        extra = None
    extra = extra or values.get("additional_special_tokens") or []
    return named, [_token(value, is_special=are_special) for value in extra]


def _token(value: Any, *, is_special: bool = False) -> _Token:
    return value if isinstance(value, str) else _added(value, is_special=is_special)


def _added(value: Mapping[str, Any], *, is_special: bool = False) -> AddedToken:
    flags = {flag: value[flag] for flag in _FLAGS if flag in value}
    return AddedToken(value["content"], **(flags | {"special": True} if is_special else flags))


def _as_special(token: _Token, names: set[str]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if str(token) in names:
        token.special = True
    return token
