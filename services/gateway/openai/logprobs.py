"""Logprobs in OpenAI's forms, and those of a prompt in vLLM's.

They are written down as JSON when they come, a few thousand at a time: a long prompt's would keep
everybody else waiting if they were written at the answer's end.

A token's text is what it adds to a text that has begun; a special one is what it is written as. Of
a character that several tokens make together each has U+FFFD for text, and its own bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Protocol

from baton.services.gateway.tokenizer import TextCodec
from baton.shared.rpc.errors import InvalidField
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2

MAX_LOGPROBS = 1 << 19
"""In an answer that is not streamed, own ones and those of the likeliest: tens of megabytes."""
_LEAST = -9999.0
"""JSON has no infinity."""


def bound_logprobs(requests: Sequence[pb.GenerateRequest], num_top: int) -> None:
    """For a whole answer, of which all are there at a time. A request that does not say how long
    its answers may be gets as many tokens as there is room for.

    Raises InvalidField for those that ask for more.
    """
    num_answers = sum(request.n if request.HasField("n") else 1 for request in requests)
    most = MAX_LOGPROBS // max(num_answers * (1 + num_top), 1)
    for request in requests:
        sampling = request.sampling
        if request.clamp_max_tokens:
            sampling.max_tokens = min(sampling.max_tokens, max(most, 1))
        elif sampling.max_tokens > most:
            num_logprobs = sampling.max_tokens * num_answers * (1 + num_top)
            problem = f"is {num_top}, which makes {num_logprobs} logprobs"
            limit = f"{MAX_LOGPROBS} of answers that are not streamed"
            raise InvalidField("sampling.logprobs", problem, limit=limit)


class TokenTexts:
    """`codec`: None: the model has no tokenizer, and tokens are named by their ids."""

    def __init__(self, codec: TextCodec | None) -> None:
        self._codec = codec

    def text(self, token_id: int) -> str:
        if self._codec is None:
            return f"token_id:{token_id}"
        return self._codec.shown_bytes(token_id).decode(errors="replace")

    def bytes(self, token_id: int) -> list[int] | None:
        return None if self._codec is None else list(self._codec.shown_bytes(token_id))


class Logprobs(Protocol):
    """Of one choice, in the form of its endpoint."""

    def begin(self, token_id: int) -> None:
        """The first token of a prompt that is echoed: nothing is told of it."""

    def add(self, token_ids: Sequence[int], told: Sequence[types_pb2.TokenLogprobs]) -> None: ...

    def take(self) -> str:
        """JSON of what was added since the last call; null: nothing was."""

    def take_entries(self) -> list[str]:
        """The same by token, where the form has an entry for each."""


class ChatLogprobs:
    def __init__(self, texts: TokenTexts, num_top: int) -> None:
        self._texts = texts
        self._num_top = num_top
        self._entries: list[str] = []

    def begin(self, token_id: int) -> None:
        raise NotImplementedError("no chat is echoed")

    def add(self, token_ids: Sequence[int], told: Sequence[types_pb2.TokenLogprobs]) -> None:
        for token_id, each in zip(token_ids, told, strict=True):
            top = ", ".join(
                f"{self._token(*likely)}}}" for likely in _likeliest(each, self._num_top)
            )
            own = self._token(token_id, each.logprob)
            self._entries.append(f'{own}, "top_logprobs": [{top}]}}')

    def take(self) -> str:
        entries = self.take_entries()
        return f'{{"content": [{", ".join(entries)}], "refusal": null}}' if entries else "null"

    def take_entries(self) -> list[str]:
        entries, self._entries = self._entries, []
        return entries

    def _token(self, token_id: int, logprob: float) -> str:
        """Without its closing brace."""
        text, known = json.dumps(self._texts.text(token_id)), self._texts.bytes(token_id)
        shown = "null" if known is None else str(known)
        return f'{{"token": {text}, "logprob": {max(logprob, _LEAST)!r}, "bytes": {shown}'


class CompletionLogprobs:
    """Columns. `text_offset` counts characters of the tokens' texts, from the choice's first."""

    def __init__(self, texts: TokenTexts, num_top: int) -> None:
        self._texts = texts
        self._num_top = num_top
        self._offset = 0
        self._tokens: list[str] = []
        self._logprobs: list[str] = []
        self._top: list[str] = []
        self._offsets: list[str] = []

    def begin(self, token_id: int) -> None:
        self._add(token_id, "null", "null")

    def add(self, token_ids: Sequence[int], told: Sequence[types_pb2.TokenLogprobs]) -> None:
        for token_id, each in zip(token_ids, told, strict=True):
            top: dict[str, float] = {}
            for likely, logprob in _likeliest(each, self._num_top):
                # Of tokens with one text the likeliest stands for all.
                top.setdefault(self._texts.text(likely), max(logprob, _LEAST))
            own = max(each.logprob, _LEAST)
            top.setdefault(self._texts.text(token_id), own)
            self._add(token_id, repr(own), json.dumps(top))

    def take(self) -> str:
        if not self._tokens:
            return "null"
        columns = {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._top,
            "text_offset": self._offsets,
        }
        shown = ", ".join(f'"{name}": [{", ".join(values)}]' for name, values in columns.items())
        for values in columns.values():
            values.clear()
        return f"{{{shown}}}"

    def take_entries(self) -> list[str]:
        raise NotImplementedError("a completion's are columns")

    def _add(self, token_id: int, logprob: str, top: str) -> None:
        text = self._texts.text(token_id)
        self._tokens.append(json.dumps(text))
        self._logprobs.append(logprob)
        self._top.append(top)
        self._offsets.append(str(self._offset))
        self._offset += len(text)


class PromptLogprobs:
    """As vLLM has them: by token, of the prompt's own and of the likeliest; null for the first."""

    def __init__(self, texts: TokenTexts, num_top: int) -> None:
        self._texts = texts
        self._num_top = num_top
        self._entries = ["null"]

    def add(self, token_ids: Sequence[int], told: Sequence[types_pb2.TokenLogprobs]) -> None:
        for token_id, each in zip(token_ids, told, strict=True):
            entries = {token_id: self._entry(token_id, each.logprob, each.rank)}
            for rank, (likely, logprob) in enumerate(_likeliest(each, self._num_top), 1):
                entries.setdefault(likely, self._entry(likely, logprob, rank))
            shown = ", ".join(f'"{token_id}": {entry}' for token_id, entry in entries.items())
            self._entries.append(f"{{{shown}}}")

    def json(self) -> str:
        return f"[{', '.join(self._entries)}]"

    def _entry(self, token_id: int, logprob: float, rank: int) -> str:
        text = json.dumps(self._texts.text(token_id))
        shown = max(logprob, _LEAST)
        return f'{{"logprob": {shown!r}, "rank": {rank}, "decoded_token": {text}}}'


def _likeliest(told: types_pb2.TokenLogprobs, num_top: int) -> Iterable[tuple[int, float]]:
    """Workers may have been asked for more."""
    return zip(told.top_token_ids[:num_top], told.top_logprobs[:num_top], strict=True)
