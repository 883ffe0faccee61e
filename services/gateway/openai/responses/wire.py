"""What an answer looks like at /v1/responses: items, and the typed events that bring them.

    created · in_progress · item added ─► part added ─► deltas ─► done ─► part done ─► item done · …
    completed, or incomplete, or failed

A delta is put together from text that does not change: this runs once per token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from baton.services.gateway.answer_parts import Arguments, Content, Part, Reasoning, ToolCall
from baton.services.gateway.openai.errors import HttpError
from baton.services.gateway.openai.wire import Choice


class ResponsesWire:
    follows = True

    def __init__(
        self, request_id: str, *, told: Mapping[str, Any], is_streamed: bool = True
    ) -> None:
        """`told`: of the request, and of what holds for it, as every response tells it."""
        self._request_id = request_id
        self._response = {
            "id": f"resp_{request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            **told,
        }
        self._output: list[dict[str, Any]] = []
        self._item: _Item | None = None
        self._num_events = 0
        self._is_streamed = is_streamed
        self._logprobs: list[str] = []
        """Of tokens whose text is still to come."""
        self._num_logprobs = 0
        """Of all tokens so far."""

    def started(self, index: int, choice: Choice) -> bytes:
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._event(kind, response=self._response) for kind in kinds)

    def came(
        self, index: int, choice: Choice, parts: Sequence[Part], token_ids: Sequence[int]
    ) -> bytes:
        self._take_logprobs(choice)
        return b"".join(map(self._part, parts))

    def finished(self, index: int, choice: Choice) -> bytes:
        is_whole = choice.finish_reason != "length"
        events = b""
        if not self._output and self._item is None:
            # An answer without a word is a message all the same.
            events = self._begin(_Message())
        self._take_logprobs(choice)
        if self._logprobs and isinstance(self._item, _Message):
            # Of the token that ended it, say, which has no text.
            events += self._delta(self._item, "")
        events += self._end("completed" if is_whole else "incomplete")
        status = "completed" if is_whole else "incomplete"
        self._response |= {
            "status": status,
            "output": self._output,
            "usage": _usage(choice),
            "completed_at": int(time.time()) if is_whole else None,
        }
        if not is_whole:
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        return events + self._event(f"response.{status}", response=self._response)

    def ended(self, choices: Sequence[Choice]) -> bytes:
        return b""

    def failed(self, error: HttpError) -> bytes:
        if self._item is not None:
            self._output.append(self._item.whole("incomplete"))
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        self._response |= {
            "status": "failed",
            "output": self._output,
            "error": {"code": code, "message": error.message},
        }
        return self._event("response.failed", response=self._response)

    def whole(self, choices: Sequence[Choice]) -> bytes:
        self._is_streamed = False
        [choice] = choices
        self.came(0, choice, choice.parts, ())
        self.finished(0, choice)
        return _json(self._response).encode()

    def _take_logprobs(self, choice: Choice) -> None:
        """Of the message's tokens alone: what is known to be reasoning is left out."""
        if choice.logprobs is None:
            return
        new = choice.logprobs.take_entries()
        self._num_logprobs += len(new)
        self._logprobs += new
        num_others = self._num_logprobs - choice.parser.num_reasoning_tokens
        del self._logprobs[: max(0, len(self._logprobs) - num_others)]

    def _part(self, part: Part) -> bytes:
        match part:
            case Content(text):
                return self._text(text, _Message)
            case Reasoning(text):
                return self._text(text, _Reasoning)
            case ToolCall(_, call_id, name):
                self._logprobs.clear()
                return self._begin(_Call(call_id, name))
            case Arguments(_, text):
                self._logprobs.clear()
                assert self._item is not None
                return self._delta(self._item, text)

    def _text(self, text: str, kind: type[_Message] | type[_Reasoning]) -> bytes:
        if not text:
            return b""
        events = b"" if isinstance(self._item, kind) else self._begin(kind())
        assert self._item is not None
        return events + self._delta(self._item, text)

    def _begin(self, item: _Item) -> bytes:
        events = self._end("completed")
        self._item = item
        item.begin(self._request_id, len(self._output))
        begun = item.whole("in_progress", is_empty=True)
        events += self._event("response.output_item.added", output_index=item.at, item=begun)
        if item.part_kind:
            events += self._part_event("added", item, "")
        return events

    def _delta(self, item: _Item, text: str) -> bytes:
        item.texts.append(text)
        tail = ""
        if isinstance(item, _Message):
            logprobs = ", ".join(self._logprobs)
            item.logprobs += self._logprobs
            self._logprobs.clear()
            tail = f', "logprobs": [{logprobs}]'
        if not self._is_streamed:
            return b""
        number = self._num_events
        self._num_events += 1
        # Escaped to ASCII: some clients end a line at U+2028.
        return (
            f'{item.delta_head}{json.dumps(text)}{tail}, "sequence_number": {number}}}\n\n'
        ).encode()

    def _end(self, status: str) -> bytes:
        """Of the item that is being told, if there is one."""
        item, self._item = self._item, None
        if item is None:
            return b""
        events = self._event(f"{item.event}.done", **item.where, **item.done())
        if item.part_kind:
            events += self._part_event("done", item, item.text)
        whole = item.whole(status)
        self._output.append(whole)
        return events + self._event("response.output_item.done", output_index=item.at, item=whole)

    def _part_event(self, what: str, item: _Item, text: str) -> bytes:
        kind = f"response.content_part.{what}"
        return self._event(kind, **item.where, part=item.part(text))

    def _event(self, kind: str, **fields: Any) -> bytes:
        if not self._is_streamed:
            return b""
        data = {"type": kind, **fields, "sequence_number": self._num_events}
        self._num_events += 1
        return f"event: {kind}\ndata: {_json(data)}\n\n".encode()


class _Item:
    """Of the output, as far as it has come."""

    prefix: str
    event: str
    """Of its text."""
    part_kind = ""
    """Of the one part that has the text; empty: it has it by itself."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def begin(self, request_id: str, at: int) -> None:
        """`at`: its place in the output."""
        self.at = at
        self.id = f"{self.prefix}_{request_id}_{at}"
        self.where: dict[str, Any] = {"item_id": self.id, "output_index": at}
        if self.part_kind:
            self.where["content_index"] = 0
        head = json.dumps({"type": f"{self.event}.delta", **self.where})[:-1]
        self.delta_head = f'event: {self.event}.delta\ndata: {head}, "delta": '

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def part(self, text: str) -> dict[str, Any]:
        return {"type": self.part_kind, "text": text}

    def done(self) -> dict[str, Any]:
        """What is told of the text when it is whole."""
        return {"text": self.text}

    def whole(self, status: str, *, is_empty: bool = False) -> dict[str, Any]:
        raise NotImplementedError


class _Message(_Item):
    prefix, event, part_kind = "msg", "response.output_text", "output_text"

    def __init__(self) -> None:
        super().__init__()
        self.logprobs: list[str] = []
        """JSON, of each token whose text has come."""

    def part(self, text: str) -> dict[str, Any]:
        return {**super().part(text), "annotations": [], "logprobs": _Written(self.logprobs)}

    def done(self) -> dict[str, Any]:
        return {**super().done(), "logprobs": _Written(self.logprobs)}

    def whole(self, status: str, *, is_empty: bool = False) -> dict[str, Any]:
        content = [] if is_empty else [self.part(self.text)]
        about = {"id": self.id, "type": "message", "role": "assistant", "status": status}
        return {**about, "content": content}


class _Reasoning(_Item):
    prefix, event, part_kind = "rs", "response.reasoning_text", "reasoning_text"

    def whole(self, status: str, *, is_empty: bool = False) -> dict[str, Any]:
        content = [] if is_empty else [self.part(self.text)]
        about = {"id": self.id, "type": "reasoning", "status": status, "summary": []}
        return {**about, "content": content, "encrypted_content": None}


class _Call(_Item):
    prefix, event = "fc", "response.function_call_arguments"

    def __init__(self, call_id: str, name: str) -> None:
        super().__init__()
        self._call_id = call_id
        self._name = name

    def done(self) -> dict[str, Any]:
        return {"name": self._name, "arguments": self.text}

    def whole(self, status: str, *, is_empty: bool = False) -> dict[str, Any]:
        about = {"id": self.id, "type": "function_call", "status": status}
        return {
            **about,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": self.text,
        }


_WAY = frozenset(("response", "output", "item", "content", "part", "logprobs"))
"""Where logprobs are."""


class _Written(list[str]):
    """A list whose entries are JSON already."""


def _json(value: Any) -> str:
    """As json.dumps; logprobs, which may be hundreds of thousands, are not written again."""
    if isinstance(value, _Written):
        return f"[{', '.join(value)}]"
    if isinstance(value, list):
        return f"[{', '.join(map(_json, value))}]"
    if not isinstance(value, dict):
        return json.dumps(value)
    members = (
        f"{json.dumps(name)}: {_json(each) if name in _WAY else json.dumps(each)}"
        for name, each in value.items()
    )
    return f"{{{', '.join(members)}}}"


def _usage(choice: Choice) -> dict[str, Any]:
    num_prompt, num_completion = choice.num_prompt_tokens, choice.num_completion_tokens
    return {
        "input_tokens": num_prompt,
        "input_tokens_details": {
            "cached_tokens": choice.num_cached_tokens,
            "cache_write_tokens": 0,
        },
        "output_tokens": num_completion,
        "output_tokens_details": {"reasoning_tokens": choice.parser.num_reasoning_tokens},
        "total_tokens": num_prompt + num_completion,
    }
