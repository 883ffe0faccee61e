"""Text to tokens, and back while the tokens still arrive.

    token ids ──► the text that is certain ──► what no stop string can claim ──► Delta
                  _BytesToText, _PiecesToText      StopFinder

Both steps hold back only what later tokens could still change, so what a StreamDecoder has
given out after k tokens is a function of these k tokens, however they were grouped, and all of
it together is the one-shot decode of all of them. A resumed answer relies on that.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tokenizers import Tokenizer

from baton.services.gateway.chat_template import ChatTemplate
from baton.services.gateway.stops import StopFinder
from baton.shared.engine.config import ModelError
from baton.shared.rpc.errors import InvalidField

_NUM_ENCODING_THREADS = 2
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LOCAL_DECODERS = {"ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}


class TextCodec:
    """The model directory's tokenizer. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, chat_template: ChatTemplate | None) -> None:
        """Raises ValueError for a decoder whose text cannot be streamed."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._chat_template = chat_template
        self._tokenizer = tokenizer
        self._special_ids = frozenset(
            token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        )
        decoders = list(_flat_decoders(json.loads(tokenizer.to_str())["decoder"]))
        kinds = [decoder["type"] for decoder in decoders]
        self._is_byte_level = kinds in (["ByteLevel"], ["ByteLevel", "Fuse"])
        if not self._is_byte_level:
            _check_local(decoders)
        self._byte_ids = frozenset(
            token_id
            for token, token_id in tokenizer.get_vocab().items()
            if "ByteFallback" in kinds and _BYTE_TOKEN.fullmatch(token)
        )
        self._token_bytes: dict[int, bytes] = {}
        self._token_pieces: dict[int, str] = {}
        self._threads = ThreadPoolExecutor(_NUM_ENCODING_THREADS, "tokenise")

    @classmethod
    def load(cls, model_dir: Path) -> TextCodec | None:
        """None without tokenizer.json; ModelError, naming the file, when one cannot be used."""
        path = model_dir / "tokenizer.json"
        if not path.exists():
            return None
        chat_template = ChatTemplate.load(model_dir)
        try:
            return cls(Tokenizer.from_file(str(path)), chat_template)
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path}: {' '.join(str(error).split())}") from error

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Special tokens written in the text are recognised; `add_special_tokens` lets the
        tokenizer's own post-processor put its own around it."""
        # Of the library's calls only those for batches let other threads run meanwhile.
        [encoding] = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        return encoding.ids

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """`encode` on one of a few threads: a huge text delays neither streams nor ticks."""
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: self.encode(text, add_special_tokens=add_special_tokens)
        )

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Ids that the tokenizer does not know yield no text."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special)

    async def decode_async(self, token_ids: Sequence[int], *, skip_special: bool) -> str:
        """`decode` on one of the threads of `encode_async`."""
        [text] = await asyncio.get_running_loop().run_in_executor(
            self._threads,
            lambda: self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special),
        )
        return text

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """As the vocabulary writes them; empty for ids that it lacks."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    @property
    def chat_template(self) -> str | None:
        """Its Jinja source."""
        return self._chat_template.source if self._chat_template else None

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a chat. It brings its special tokens: encode it without adding more.

        Raises InvalidField when there is no template or the template refuses the messages.
        """
        if self._chat_template is None:
            raise InvalidField("messages", "need a chat template", limit="the model has none")
        return self._chat_template.render(messages, add_generation_prompt=add_generation_prompt)

    async def render_chat_async(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """`render_chat` on one of the threads of `encode_async`."""
        return await asyncio.get_running_loop().run_in_executor(
            self._threads,
            lambda: self.render_chat(messages, add_generation_prompt=add_generation_prompt),
        )

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def is_text(self, token_id: int) -> bool:
        """Whether the token may yield text: known, and not special."""
        return token_id not in self._special_ids and (
            self._tokenizer.id_to_token(token_id) is not None
        )

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is one byte of a character that the vocabulary lacks (`<0xE2>`)."""
        return token_id in self._byte_ids

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8, possibly cut within a character. Byte-level tokenizers only."""
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._look_up_bytes(token_id)
        return known

    def token_piece(self, token_id: int) -> str:
        """The text of a token that is not the first one. Not for byte-level tokenizers."""
        known = self._token_pieces.get(token_id)
        if known is None:
            # Decoders treat the first token in a way of its own, so it follows itself here.
            start = len(self.decode([token_id]))
            known = self._token_pieces[token_id] = self.decode([token_id, token_id])[start:]
        return known

    def new_text_stream(self) -> _TextStream:
        return _BytesToText(self) if self._is_byte_level else _PiecesToText(self)

    def _look_up_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._special_ids:
            return b""
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # an added token, written as itself
            return token.encode()


class Delta(NamedTuple):
    """What one push gave."""

    text: str
    stopped: bool
    """A stop string has ended the answer; `text` ends before it."""
    num_tokens_used: int
    """How many of the pushed tokens belong to the answer: all, unless it stopped within them."""


class StreamDecoder:
    """The text of one answer, trimmed at the first stop string.

    The first stop string is the one that starts earliest. One that is complete waits while
    another that starts before it could still become complete; of two that start together the
    shorter decides, as the text is the same.
    """

    def __init__(self, codec: TextCodec, stops: Sequence[str]) -> None:
        self._text_stream = codec.new_text_stream()
        self._stop_finder = StopFinder(stops) if stops else None
        self.stopped = False

    def push(self, token_ids: Sequence[int]) -> Delta:
        """Tokens pushed after a stop are not used."""
        if self.stopped:
            return Delta("", True, 0)
        feed = self._text_stream.feed
        if self._stop_finder is None:
            return Delta("".join([feed(token_id) for token_id in token_ids]), False, len(token_ids))
        texts = []
        for num_used, token_id in enumerate(token_ids, start=1):
            text, self.stopped = self._stop_finder.feed(feed(token_id))
            texts.append(text)
            if self.stopped:
                return Delta("".join(texts), True, num_used)
        return Delta("".join(texts), False, len(token_ids))

    def finish(self) -> str:
        """What was held back. It may turn out to hold a stop string: then `stopped` becomes true
        and the text ends before it. Nothing may be pushed afterwards."""
        if self.stopped:
            return ""
        text = self._text_stream.flush()
        if self._stop_finder is None:
            return text
        text, self.stopped = self._stop_finder.flush(text)
        return text


class _TextStream(Protocol):
    def feed(self, token_id: int) -> str:
        """The text that this token makes certain."""

    def flush(self) -> str:
        """The rest, when no token follows."""


class _BytesToText:
    """Byte-level tokenizers: tokens are bytes, text is their lossy UTF-8.

    Holds back a cut character only: bytes that cannot be one become U+FFFD at once (those of a
    surrogate with its third byte), as many as the one-shot decode gives.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._bytes_of = codec.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _PiecesToText:
    """Tokenizers whose tokens are text, the first one's treated in a way of its own.

    Holds back a run of byte tokens until it ends: the decoder takes the run as a whole, and one
    wrong byte at its end turns all of it into U+FFFD.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._previous: list[int] = []
        """The last token that was no byte, where there was one."""
        self._byte_run: list[int] = []
        self._is_first = True

    def feed(self, token_id: int) -> str:
        codec = self._codec
        if not codec.is_text(token_id):
            return ""
        if codec.is_byte(token_id):
            self._byte_run.append(token_id)
            return ""
        text = self.flush()
        text += codec.decode([token_id]) if self._is_first else codec.token_piece(token_id)
        self._previous = [token_id]
        self._is_first = False
        return text

    def flush(self) -> str:
        if not self._byte_run:
            return ""
        start = len(self._codec.decode(self._previous))
        text = self._codec.decode(self._previous + self._byte_run)[start:]
        self._byte_run = []
        self._is_first = False
        return text


def _byte_alphabet() -> dict[str, int]:
    """How byte-level vocabularies write a byte: as the Latin-1 character that it is where that
    can be seen, otherwise as the next character from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    invisible = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + index): byte for index, byte in enumerate(invisible)
    }


_BYTE_OF_CHARACTER = _byte_alphabet()


def _flat_decoders(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is not None and decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _flat_decoders(part)
    elif decoder is not None:
        yield decoder


def _check_local(decoders: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError unless a token's text depends on nothing but whether it is the first."""
    is_fused = False
    for decoder in decoders:
        kind = decoder["type"]
        is_strip_of_first = kind == "Strip" and decoder["start"] <= 1 and decoder["stop"] == 0
        if kind not in _LOCAL_DECODERS or (is_fused and not is_strip_of_first):
            raise ValueError(f"decoder: text from {kind} at this place cannot be streamed")
        is_fused = is_fused or kind == "Fuse"
