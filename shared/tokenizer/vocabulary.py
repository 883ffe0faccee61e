"""What each token of a tokenizer is: text, one byte of a character, special, or nothing."""

from __future__ import annotations

from functools import cached_property

from tokenizers import Tokenizer

from baton.shared.tokenizer.decoder_steps import BYTE_OF_CHARACTER, byte_tokens, is_byte_level


class Vocabulary:
    """
    Attributes:
        is_byte_level: tokens are bytes; otherwise they are texts.
        special: id → what it is written as, of tokens that yield no text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError for a decoder whose text cannot be streamed."""
        self._tokenizer = tokenizer
        self.special: dict[int, str] = {
            token_id: token.content
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        self.is_byte_level = is_byte_level(tokenizer)
        self._bytes = byte_tokens(tokenizer)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """`special`, the other way round."""
        return {written: token_id for token_id, written in self.special.items()}

    @property
    def has_byte_tokens(self) -> bool:
        """Whether the vocabulary writes what it lacks in tokens of one byte each."""
        return bool(self._bytes)

    def is_known(self, token_id: int) -> bool:
        return self._tokenizer.id_to_token(token_id) is not None

    def is_text(self, token_id: int) -> bool:
        """Whether the token may yield text: known, and not special."""
        return token_id not in self.special and self.is_known(token_id)

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is one byte of a character that the vocabulary lacks (`<0xE2>`)."""
        return token_id in self._bytes

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8, possibly cut within a character; of a byte-level tokenizer, or of a token that is
        one byte."""
        if token_id in self._bytes:
            return bytes((self._bytes[token_id],))
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self.special:
            return b""
        try:
            return bytes(BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # an added token, written as itself
            return token.encode()

    def text_of(self, token_ids: tuple[int, ...], *, is_first: bool) -> str:
        """The text of one token, or of the byte tokens of one character. What begins a text is
        treated in a way of its own: a space in front is dropped, say. Not for byte-level
        tokenizers."""
        text = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        if is_first:
            return text
        # So that it is not the first, it follows itself.
        twice = self._tokenizer.decode(token_ids * 2, skip_special_tokens=False)
        return twice[len(text) :]

    def all_bytes(self, num_tokens: int) -> list[bytes]:
        """By id up to `num_tokens`: what the token adds to a text that has begun; of tokens that
        yield no text, and of ids that there are not, nothing."""
        if self.is_byte_level:
            return [self.token_bytes(token_id) for token_id in range(num_tokens)]
        found = [b""] * num_tokens
        texts = [
            token_id
            for token_id in range(min(num_tokens, self._tokenizer.get_vocab_size()))
            if self.is_text(token_id) and not self.is_byte(token_id)
        ]
        once = self._decoded([[token_id] for token_id in texts])
        twice = self._decoded([[token_id, token_id] for token_id in texts])
        for token_id, first, both in zip(texts, once, twice, strict=True):
            found[token_id] = both[len(first) :].encode()
        for token_id in self._bytes:
            if token_id < num_tokens:
                found[token_id] = self.token_bytes(token_id)
        return found

    def _decoded(self, runs: list[list[int]]) -> list[str]:
        return self._tokenizer.decode_batch(runs, skip_special_tokens=False)
