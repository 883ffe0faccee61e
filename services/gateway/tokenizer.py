"""Text to tokens, and back while the tokens still arrive.

    token ids ──► the text that is certain ──► what no stop string can claim ──► Delta
                  TextStream                    StopFinder

Both steps hold back only what later tokens could still change, so what a StreamDecoder has
given out after k tokens is a function of these k tokens, however they were grouped, and all of
it together is the one-shot decode of all of them. A resumed answer relies on that.
"""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from baton.services.gateway.chat_template import ChatTemplate
from baton.services.gateway.stops import StopFinder
from baton.services.gateway.text_stream import BytesToText, PiecesToText, TextStream
from baton.shared.model_files.fields import ModelError
from baton.shared.rpc.errors import InvalidField
from baton.shared.tokenizer.files import load_tokenizer
from baton.shared.tokenizer.vocabulary import Vocabulary

_NUM_ENCODING_THREADS = 2
_MAX_CACHED_TEXTS = 1 << 18


class TextCodec:
    """The model directory's tokenizer. Safe to use from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        *,
        eos_token_id: int | None = None,
    ) -> None:
        """Raises ValueError for a decoder whose text cannot be streamed."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.eos_token_id = eos_token_id
        """The token that the tokenizer's own files name as the end."""
        self._chat_template = chat_template
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(tokenizer)
        self._token_bytes: dict[int, bytes] = {}
        self._texts: dict[tuple[bool, tuple[int, ...]], str] = {}
        self._threads = ThreadPoolExecutor(_NUM_ENCODING_THREADS, "tokenise")

    @classmethod
    def load(cls, model_dir: Path) -> TextCodec | None:
        """None without a tokenizer; ModelError, naming the file, when one cannot be used."""
        files = load_tokenizer(model_dir)
        if files is None:
            return None
        chat_template = ChatTemplate.load(model_dir, files.special_tokens)
        try:
            return cls(files.tokenizer, chat_template, eos_token_id=files.eos_token_id)
        except ValueError as error:
            raise ModelError(f"{files.path}: {error}") from error

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
        """What a stream of these tokens gives. Ids that the tokenizer does not know yield no
        text."""
        [text] = self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special)
        if "\ufffd" not in text or not self._vocabulary.has_byte_tokens:
            return text
        # The library lets one wrong byte spoil all bytes around it.
        stream = PiecesToText(self if skip_special else _WithSpecial(self))
        return "".join([stream.feed(token_id) for token_id in token_ids]) + stream.flush()

    async def decode_async(self, token_ids: Sequence[int], *, skip_special: bool) -> str:
        """`decode` on one of the threads of `encode_async`."""
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: self.decode(token_ids, skip_special=skip_special)
        )

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """As the vocabulary writes them; empty for ids that it lacks."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    @property
    def chat_template(self) -> str | None:
        """Its Jinja source."""
        return self._chat_template.source if self._chat_template else None

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] = {},
        continue_final_message: bool = False,
    ) -> str:
        """The prompt of a chat. It brings its special tokens: encode it without adding more.

        Raises InvalidField when there is no template or the template refuses what is given.
        """
        if self._chat_template is None:
            raise InvalidField("messages", "need a chat template", limit="the model has none")
        return self._chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            variables=variables,
            continue_final_message=continue_final_message,
        )

    async def render_chat_async(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """`render_chat` on one of the threads of `encode_async`."""
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, partial(self.render_chat, messages, **options)
        )

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def is_known(self, token_id: int) -> bool:
        return self._vocabulary.is_known(token_id)

    def is_text(self, token_id: int) -> bool:
        """Whether the token may yield text: known, and not special."""
        return self._vocabulary.is_text(token_id)

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is one byte of a character that the vocabulary lacks (`<0xE2>`)."""
        return self._vocabulary.is_byte(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8, possibly cut within a character. Of byte-level tokenizers, and of tokens that
        are a byte."""
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._vocabulary.token_bytes(token_id)
        return known

    def text_of(self, token_ids: tuple[int, ...], *, is_first: bool) -> str:
        """The text of one token, or of the byte tokens of one character. What begins a text is
        treated in a way of its own: a space in front is dropped, say. Not for byte-level
        tokenizers."""
        known = self._texts.get((is_first, token_ids))
        if known is None:
            if len(self._texts) >= _MAX_CACHED_TEXTS:
                self._texts.clear()
            known = self._vocabulary.text_of(token_ids, is_first=is_first)
            self._texts[is_first, token_ids] = known
        return known

    def shown_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text that has begun, or is written as if it adds none: UTF-8, cut
        within a character perhaps. Of an id that is not known, nothing."""
        written = self._vocabulary.special.get(token_id)
        if written is not None:
            return written.encode()
        if self._vocabulary.is_byte_level or self.is_byte(token_id):
            return self.token_bytes(token_id)
        return self.text_of((token_id,), is_first=False).encode()

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Of the tokens that yield no text, by what they are written as."""
        return self._vocabulary.special_ids

    def token_id(self, written: str) -> int | None:
        """Of the token that the vocabulary writes so, whether it yields text or not."""
        return self._tokenizer.token_to_id(written)

    def written(self, token_id: int) -> str:
        """What a token that may yield no text is written as; empty for an id that is not known."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def new_text_stream(self, *, skip_special: bool = True) -> TextStream:
        tokens = self if skip_special else _WithSpecial(self)
        return BytesToText(tokens) if self._vocabulary.is_byte_level else PiecesToText(tokens)


class _WithSpecial:
    """A codec's tokens, those included that yield no text elsewhere."""

    def __init__(self, codec: TextCodec) -> None:
        self.is_text = codec.is_known
        self.is_byte = codec.is_byte
        self.token_bytes = codec.shown_bytes
        self.text_of = codec.text_of


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

    Special tokens, and those that end the answer, yield no text, but a stop string that names them
    finds them all the same. Those of `shown_token_ids` are written out; a stop string finds them
    only as a whole. Without `skip_special` special tokens are text as any other.
    """

    def __init__(
        self,
        codec: TextCodec,
        stops: Sequence[str],
        *,
        prompt: Sequence[int] = (),
        end_token_ids: Collection[int] = (),
        shown_token_ids: Collection[int] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
        skip_special: bool = True,
    ) -> None:
        """`prompt`: its text and the answer's are one; none of it is given out. `end_token_ids`:
        tokens that end the answer, of which it shows nothing. `shown_token_ids`: special tokens
        that whoever takes an answer apart has to see. `min_tokens`: stop strings are looked for in
        the text behind so many tokens. `include_stop`: what ends the answer, string or token, is
        part of its text."""
        self._new_text_stream = partial(codec.new_text_stream, skip_special=skip_special)
        self._prompt = prompt
        self._min_tokens = min_tokens
        self._has_stops = bool(stops)
        self._includes_stop = include_stop
        self._silent_ids = frozenset(() if include_stop else end_token_ids)
        silent_ids: dict[str, int] = {}
        if stops or shown_token_ids:
            silent_ids = {codec.written(token_id): token_id for token_id in self._silent_ids}
            if skip_special:
                silent_ids = {**codec.special_ids, **silent_ids}
        self._marks, self._written = _mark_tokens(silent_ids, stops, shown_token_ids)
        """The latter: what is looked for → the stop string that it stands for."""
        self._shown_as = {
            ord(mark): codec.written(token_id) if token_id in shown_token_ids else None
            for token_id, mark in self._marks.items()
        }
        self._begin()

    def _begin(self) -> None:
        self._text_stream = self._new_text_stream()
        self._text_stream.follow(self._prompt)
        self._stop_finder = StopFinder(tuple(self._written)) if self._has_stops else None
        self._num_unchecked = self._min_tokens
        self.stopped = False

    def another(self) -> StreamDecoder:
        """Of another answer to the same request. What the two have in common, which takes a walk
        through the vocabulary's special tokens, is there already."""
        other = copy.copy(self)
        other._begin()
        return other

    @property
    def stop(self) -> str | None:
        """The stop string that the answer ended with, as the request has it."""
        found = self._stop_finder.found if self._stop_finder is not None else None
        return None if found is None else self._written[found]

    def push(self, token_ids: Sequence[int]) -> Delta:
        """Tokens pushed after a stop are not used."""
        if self.stopped:
            return Delta("", True, 0)
        texts = []
        for num_used, token_id in enumerate(token_ids, start=1):
            text = self._feed(token_id)
            if self._num_unchecked > 0:
                self._num_unchecked -= 1
            elif self._stop_finder is not None:
                text, self.stopped = self._stop_finder.feed(text)
            texts.append(text)
            if self.stopped:
                return Delta(self._shown("".join(texts)) + self._stop_shown(), True, num_used)
        return Delta(self._shown("".join(texts)), False, len(token_ids))

    def finish(self) -> str:
        """What was held back. It may turn out to hold a stop string: then `stopped` becomes true
        and the text ends before it. Nothing may be pushed afterwards."""
        if self.stopped:
            return ""
        text = self._text_stream.flush()
        if self._stop_finder is not None:
            text, self.stopped = self._stop_finder.flush(text)
        return self._shown(text) + self._stop_shown()

    def _stop_shown(self) -> str:
        return self.stop or "" if self._includes_stop else ""

    def _feed(self, token_id: int) -> str:
        if token_id in self._marks:
            return self._text_stream.flush() + self._marks[token_id]
        return "" if token_id in self._silent_ids else self._text_stream.feed(token_id)

    def _shown(self, text: str) -> str:
        return text.translate(self._shown_as) if self._marks else text


def _mark_tokens(
    silent_ids: Mapping[str, int], stops: Sequence[str], shown_token_ids: Collection[int]
) -> tuple[dict[int, str], dict[str, str]]:
    """A character for each token without text that is shown or that `stops` name, and what is to be
    looked for, each with its stop: the stops as they are, and those with such tokens in them with
    the characters in their place. `silent_ids`: the tokens without text, by what they are written
    as.

    The characters are surrogates: no text has them.
    """
    if not stops and not shown_token_ids:
        return {}, {}
    named = [
        written
        for written, token_id in silent_ids.items()
        if token_id in shown_token_ids or any(written in stop for stop in stops)
    ]
    named = sorted(filter(None, named), key=len, reverse=True)
    marks = {written: chr(0xD800 + index) for index, written in enumerate(named)}
    if not marks:
        return {}, {stop: stop for stop in stops}
    pattern = re.compile("|".join(map(re.escape, named)))
    marked = [pattern.sub(lambda match: marks[match[0]], stop) for stop in stops]
    by_id = {silent_ids[written]: mark for written, mark in marks.items()}
    return by_id, dict(zip([*stops, *marked], [*stops, *stops], strict=True))
