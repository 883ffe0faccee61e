"""How a tokenizer's decoder turns tokens into text, as far as it can be done while they arrive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from baton.shared.tokenizer.files import step_of

_LOCAL = {"ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether tokens are bytes; otherwise they are texts.

    Raises ValueError when a token's text depends on more than whether it is the first one.
    """
    steps = _steps(tokenizer)
    if [step["type"] for step in steps] in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return True
    _check_local(steps)
    return False


def byte_tokens(tokenizer: Tokenizer) -> dict[int, int]:
    """Token id → byte, of tokens that are one byte of a character which the vocabulary lacks
    (`<0xE2>`)."""
    if all(step["type"] != "ByteFallback" for step in _steps(tokenizer)):
        return {}
    return {
        token_id: byte
        for byte in range(256)
        for written in (f"<0x{byte:02X}>", f"<0x{byte:02x}>")
        if (token_id := tokenizer.token_to_id(written)) is not None
    }


def _byte_alphabet() -> dict[str, int]:
    """How byte-level vocabularies write a byte: as the Latin-1 character that it is where that
    can be seen, otherwise as the next character from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    invisible = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + index): byte for index, byte in enumerate(invisible)
    }


BYTE_OF_CHARACTER = _byte_alphabet()


def _steps(tokenizer: Tokenizer) -> list[Mapping[str, Any]]:
    return list(_flat(step_of(tokenizer.decoder)))


def _flat(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if step is not None and step["type"] == "Sequence":
        for part in step["decoders"]:
            yield from _flat(part)
    elif step is not None:
        yield step


def _check_local(steps: Sequence[Mapping[str, Any]]) -> None:
    is_fused = False
    for step in steps:
        kind = step["type"]
        is_strip_of_first = kind == "Strip" and step["start"] <= 1 and step["stop"] == 0
        if kind not in _LOCAL or (is_fused and not is_strip_of_first):
            raise ValueError(f"decoder: text from {kind} at this place cannot be streamed")
        is_fused = is_fused or kind == "Fuse"
