"""What an answer looks like at /v1/messages: content blocks, and the events that bring them.

    message_start · ping · block start ─► deltas ─► block stop · … · message_delta · message_stop

A delta is put together from text that does not change: this runs once per token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from baton.services.gateway.answer_parts import Arguments, Content, Part, Reasoning, ToolCall
from baton.services.gateway.anthropic.errors import error_body
from baton.services.gateway.openai.errors import HttpError
from baton.services.gateway.openai.wire import Choice
from baton.services.gateway.strict_json import strict_json


class MessagesWire:
    follows = False

    def __init__(
        self, request_id: str, *, model: str, max_tokens: int, shows_thinking: bool = True
    ) -> None:
        """`max_tokens`: what was asked for. `shows_thinking`: else thinking blocks are empty."""
        self._request_id = request_id
        self._max_tokens = max_tokens
        self._shows_thinking = shows_thinking
        self._message = {
            "id": f"msg_{request_id}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }
        self._content: list[dict[str, Any]] = []
        """Of blocks that are whole, unless they are streamed."""
        self._num_ended = 0
        self._block: _Block | None = None
        self._is_streamed = True

    def started(self, index: int, choice: Choice) -> bytes:
        ending = {"stop_reason": None, "stop_sequence": None}
        message = {**self._message, "content": self._content, **ending, "usage": _usage(choice)}
        return self._event("message_start", message=message) + self._event("ping")

    def came(
        self, index: int, choice: Choice, parts: Sequence[Part], token_ids: Sequence[int]
    ) -> bytes:
        return b"".join(map(self._part, parts))

    def finished(self, index: int, choice: Choice) -> bytes:
        events = self._end()
        ending, usage = self._ending(choice), _usage(choice)
        return events + self._event("message_delta", delta=ending, usage=usage)

    def ended(self, choices: Sequence[Choice]) -> bytes:
        return self._event("message_stop")

    def failed(self, error: HttpError) -> bytes:
        return b"event: error\ndata: " + error_body(error, self._request_id) + b"\n\n"

    def whole(self, choices: Sequence[Choice]) -> bytes:
        self._is_streamed = False
        [choice] = choices
        self.came(0, choice, choice.parts, ())
        self._end()
        message = {**self._message, "content": self._content, **self._ending(choice)}
        return json.dumps({**message, "usage": _usage(choice)}).encode()

    def _part(self, part: Part) -> bytes:
        match part:
            case Content(text):
                return self._text(text, _Text)
            case Reasoning(text):
                return self._text(text, _Thinking)
            case ToolCall(_, call_id, name):
                return self._begin(_ToolUse(call_id, name))
            case Arguments(_, text):
                return self._delta(text)

    def _text(self, text: str, kind: type[_Text] | type[_Thinking]) -> bytes:
        if not text:
            return b""
        events = b"" if isinstance(self._block, kind) else self._begin(kind())
        if kind is _Thinking and not self._shows_thinking:
            return events
        return events + self._delta(text)

    def _begin(self, block: _Block) -> bytes:
        events = self._end()
        self._block = block
        index = self._num_ended
        head = json.dumps({"type": "content_block_delta", "index": index})[:-1]
        delta = f'"delta": {{"type": "{block.delta_type}", "{block.delta_field}": '
        block.delta_head = f"event: content_block_delta\ndata: {head}, {delta}"
        begun = block.begun()
        return events + self._event("content_block_start", index=index, content_block=begun)

    def _delta(self, text: str) -> bytes:
        assert self._block is not None
        self._block.texts.append(text)
        if not self._is_streamed:
            return b""
        # Escaped to ASCII: some clients end a line at U+2028.
        return f"{self._block.delta_head}{json.dumps(text)}}}}}\n\n".encode()

    def _end(self) -> bytes:
        """Of the block that is being told, if there is one."""
        block, self._block = self._block, None
        if block is None:
            return b""
        index = self._num_ended
        self._num_ended += 1
        events = b""
        if isinstance(block, _Thinking):
            block.signature = self._request_id
            delta = {"type": "signature_delta", "signature": block.signature}
            events = self._event("content_block_delta", index=index, delta=delta)
        if not self._is_streamed:
            self._content.append(block.whole())
        return events + self._event("content_block_stop", index=index)

    def _ending(self, choice: Choice) -> dict[str, Any]:
        reason, stop = "end_turn", None
        if choice.finish_reason == "length":
            is_full = choice.num_completion_tokens < self._max_tokens
            reason = "model_context_window_exceeded" if is_full else "max_tokens"
        elif choice.has_calls:
            reason = "tool_use"
        elif choice.stop is not None:
            reason, stop = "stop_sequence", choice.stop
        return {"stop_reason": reason, "stop_sequence": stop}

    def _event(self, kind: str, **fields: Any) -> bytes:
        if not self._is_streamed:
            return b""
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


class _Block:
    """Of the content, as far as it has come."""

    delta_type: str
    delta_field: str
    delta_head = ""

    def __init__(self) -> None:
        self.texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def begun(self) -> dict[str, Any]:
        """As it is told before its text."""
        return self.whole()

    def whole(self) -> dict[str, Any]:
        raise NotImplementedError


class _Text(_Block):
    delta_type, delta_field = "text_delta", "text"

    def whole(self) -> dict[str, Any]:
        return {"type": "text", "text": self.text}


class _Thinking(_Block):
    delta_type, delta_field = "thinking_delta", "thinking"
    signature = ""
    """Nothing depends on it; clients drop a block that has none."""

    def whole(self) -> dict[str, Any]:
        return {"type": "thinking", "thinking": self.text, "signature": self.signature}


class _ToolUse(_Block):
    delta_type, delta_field = "input_json_delta", "partial_json"

    def __init__(self, call_id: str, name: str) -> None:
        super().__init__()
        self._about = {"type": "tool_use", "id": call_id, "name": name}

    def begun(self) -> dict[str, Any]:
        return {**self._about, "input": {}}

    def whole(self) -> dict[str, Any]:
        return {**self._about, "input": _input(self.text)}


def _input(arguments: str) -> dict[str, Any]:
    """What the model wrote that is no object, or was cut, is not lost."""
    try:
        value = strict_json(arguments or "{}")
    except ValueError:
        value = arguments
    return value if isinstance(value, dict) else {"arguments": value}


def _usage(choice: Choice) -> dict[str, Any]:
    """There the cached tokens do not count among the input's."""
    return {
        "input_tokens": choice.num_prompt_tokens - choice.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": choice.num_cached_tokens,
        "output_tokens": choice.num_completion_tokens,
    }
