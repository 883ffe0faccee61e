"""Tokens to text while they still arrive.

What a stream has given out after k tokens is a function of these k tokens and of the prompt before
them: it holds back only bytes that are no character yet. Bytes that cannot become one are U+FFFD.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

_REPLACE_EACH_BYTE = "baton.replace-each-byte"


class TextStream(Protocol):
    def follow(self, prompt: Sequence[int]) -> None:
        """Called before the first token: the text to come goes on where `prompt` ended."""

    def feed(self, token_id: int) -> str:
        """The text that this token makes certain."""

    def flush(self) -> str:
        """The rest, as if no token followed. Others may follow all the same."""


class TokenText(Protocol):
    """What streams ask of a tokenizer."""

    def is_text(self, token_id: int) -> bool:
        """Whether the token yields text: known, and not one that is left out."""

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is one byte of a character that the vocabulary lacks (`<0xE2>`)."""

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8, possibly cut within a character; empty for what is no text."""

    def text_of(self, token_ids: tuple[int, ...], *, is_first: bool) -> str:
        """The text of one token, or of the byte tokens of one character."""


class BytesToText:
    """Byte-level tokenizers: tokens are bytes, text is their UTF-8.

    Replaces what Unicode calls a maximal part of a character by one U+FFFD, as the tokenizers'
    own decoder does.
    """

    def __init__(self, tokens: TokenText) -> None:
        self._bytes_of = tokens.token_bytes
        self._utf8 = _Utf8("replace")

    def follow(self, prompt: Sequence[int]) -> None:
        tail = b""
        for token_id in reversed(prompt):
            tail = self._bytes_of(token_id) + tail
            if len(tail) >= _MAX_CUT_BYTES:
                break
        self._utf8.follow(tail)

    def feed(self, token_id: int) -> str:
        return self._utf8.feed(self._bytes_of(token_id))

    def flush(self) -> str:
        return self._utf8.flush()


class PiecesToText:
    """Tokenizers whose tokens are text, the first one's treated in a way of its own.

    What the vocabulary lacks is written in tokens of one byte each. As sentencepiece, and unlike
    the tokenizers' own decoder, this lets a wrong byte spoil nothing but itself: characters before
    it are out already.
    """

    def __init__(self, tokens: TokenText) -> None:
        self._tokens = tokens
        self._is_first = True
        self._utf8 = _Utf8(_REPLACE_EACH_BYTE)
        self._byte_run: list[int] = []
        """The last byte tokens, as many as a character may have."""

    def follow(self, prompt: Sequence[int]) -> None:
        for token_id in filter(self._tokens.is_text, reversed(prompt)):
            self._is_first = False
            if not self._tokens.is_byte(token_id) or len(self._byte_run) == _MAX_CUT_BYTES:
                break
            self._byte_run.insert(0, token_id)
        self._utf8.follow(b"".join(map(self._tokens.token_bytes, self._byte_run)))

    def feed(self, token_id: int) -> str:
        if not self._tokens.is_text(token_id):
            return ""
        if self._tokens.is_byte(token_id):
            return self._feed_byte(token_id)
        return self.flush() + self._text_of(token_id)

    def flush(self) -> str:
        text = self._utf8.flush()
        self._byte_run.clear()
        self._is_first = self._is_first and not text
        return text

    def _feed_byte(self, token_id: int) -> str:
        self._byte_run = [*self._byte_run[-_MAX_CUT_BYTES:], token_id]
        text = self._utf8.feed(self._tokens.token_bytes(token_id))
        if not text:
            return ""
        if "\ufffd" not in text:
            text = self._text_of(*self._byte_run[-len(text.encode()) :])
        self._is_first = False
        return text

    def _text_of(self, *token_ids: int) -> str:
        text = self._tokens.text_of(token_ids, is_first=self._is_first)
        self._is_first = False
        return text


_MAX_CUT_BYTES = 3
"""Of a character that lacks at least its last byte."""


class _Utf8:
    """Characters out of bytes that come in pieces."""

    def __init__(self, errors: str) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._borrowed = b""
        """The beginning of a character that only the prompt has written so far."""

    def follow(self, tail: bytes) -> None:
        self._decoder.decode(tail[-_MAX_CUT_BYTES:])
        self._borrowed = self._decoder.getstate()[0]

    def feed(self, data: bytes) -> str:
        if self._borrowed and data:
            if not _goes_on(self._borrowed, data[:1]):
                self._decoder.reset()
            self._borrowed = b""
        return self._decoder.decode(data)

    def flush(self) -> str:
        if self._borrowed:
            # The prompt's own text, not the answer's.
            self._borrowed = b""
            self._decoder.reset()
        return self._decoder.decode(b"", final=True)


def _goes_on(beginning: bytes, byte: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")("strict").decode(beginning + byte)
    except UnicodeDecodeError:
        return False
    return True


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_REPLACE_EACH_BYTE, _replace_each_byte)
