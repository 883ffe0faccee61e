"""What llguidance is told of a model's tokens: their bytes, which are special, which end."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llguidance import LLTokenizer
from llguidance._tokenizer import TokenizerWrapper
from tokenizers import Tokenizer

from baton.shared.model_files.fields import ModelError
from baton.shared.model_files.info import load_model_info
from baton.shared.tokenizer.files import load_tokenizer
from baton.shared.tokenizer.vocabulary import Vocabulary


class TokenTable:
    """
    Attributes:
        token_bytes: by id, the model's whole vocabulary; of special tokens what they are written
            as; empty for ids without a token.
        special_ids: by what they are written as, of the tokens that yield no text.
        end_ids: those that end an answer.
        for_grammars: the same for llguidance.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        """`vocab_size`: the model's, which may be padded."""
        self._tokenizer = tokenizer
        vocabulary = Vocabulary(tokenizer)
        # They end an answer even where the tokenizer takes them for text.
        special = {
            **vocabulary.special,
            **{token_id: tokenizer.id_to_token(token_id) or "" for token_id in end_ids},
        }
        special = {token_id: text for token_id, text in special.items() if token_id < vocab_size}
        self._special = frozenset(special)
        self.vocab_size = vocab_size
        self.end_ids = tuple(sorted(end_ids))
        self.special_ids: Mapping[str, int] = {text: each for each, text in special.items()}
        self.token_bytes = vocabulary.all_bytes(vocab_size)
        for token_id, written in special.items():
            self.token_bytes[token_id] = written.encode() or b"<end>"
        self._ids = {
            text: token_id
            for token_id, text in enumerate(self.token_bytes)
            if text and token_id not in special
        }
        self._sorted = sorted((text, each) for each, text in enumerate(self.token_bytes) if text)
        self._longest = max(map(len, self._ids), default=1)
        self.for_grammars = LLTokenizer(
            TokenizerWrapper(_ForGrammars(self, sorted(special))), eos_token=list(self.end_ids)
        )
        self._special_pattern = re.compile(
            "|".join(
                re.escape(text) for text in sorted(self.special_ids, key=len, reverse=True) if text
            )
            or r"(?!)"
        )

    @classmethod
    def load(cls, model_dir: Path, vocab_size: int) -> TokenTable | None:
        """None without a tokenizer. Raises ModelError."""
        files = load_tokenizer(model_dir)
        if files is None:
            return None
        end_ids = set(load_model_info(model_dir).eos_token_ids)
        if files.eos_token_id is not None and files.eos_token_id < vocab_size:
            end_ids.add(files.eos_token_id)
        if not end_ids:
            # What is complete could not end.
            raise ModelError("the model names no token that ends an answer, as a constraint needs")
        files.tokenizer.no_truncation()
        files.tokenizer.no_padding()
        return cls(files.tokenizer, vocab_size, sorted(end_ids))

    def beginning_with(self, text: bytes) -> Iterator[int]:
        """The tokens that do, special ones among them."""
        for place in range(bisect_left(self._sorted, (text, 0)), len(self._sorted)):
            written, token_id = self._sorted[place]
            if not written.startswith(text):
                return
            yield token_id

    def split(self, text: str) -> list[str | int]:
        """A text's parts: the special tokens written in it, by id, and what is between them."""
        parts: list[str | int] = []
        place = 0
        for match in self._special_pattern.finditer(text):
            parts += [text[place : match.start()], self.special_ids[match[0]]]
            place = match.end()
        return [part for part in [*parts, text[place:]] if part != ""]

    def encode(self, text: bytes) -> list[int]:
        """As the model would write it, where the tokenizer's own tokens are just this text; else
        the longest tokens, one after the other."""
        try:
            token_ids = self._tokenizer.encode(text.decode(), add_special_tokens=False).ids
        except UnicodeDecodeError:
            token_ids = []
        if any(each >= self.vocab_size or each in self._special for each in token_ids):
            return self._longest_tokens(text)
        written = b"".join(self.token_bytes[each] for each in token_ids)
        return token_ids if written == text else self._longest_tokens(text)

    def _longest_tokens(self, text: bytes) -> list[int]:
        found, place = [], 0
        while place < len(text):
            for length in range(min(self._longest, len(text) - place), 0, -1):
                token_id = self._ids.get(text[place : place + length])
                if token_id is not None:
                    found.append(token_id)
                    place += length
                    break
            else:
                break
        return found


class _ForGrammars:
    """As llguidance asks for a tokenizer."""

    bos_token_id = None

    def __init__(self, table: TokenTable, special_ids: list[int]) -> None:
        self._encode = table.encode
        self.tokens = table.token_bytes
        self.special_token_ids = special_ids
        # Only the first of them; LLTokenizer gets them all.
        self.eos_token_id = table.end_ids[0] if table.end_ids else 0

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text if isinstance(text, bytes) else text.encode())
