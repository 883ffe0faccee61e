"""What an answer looks like: completions and chats, whole and as chunks.

Every endpoint has a Wire of its own, over the same choices. Of OpenAI's, a chunk is put together
from text that does not change: this runs once per token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from baton.services.gateway.answer_parts import (
    AnswerParser,
    Arguments,
    Content,
    Part,
    PlainParser,
    Reasoning,
    ToolCall,
)
from baton.services.gateway.openai.errors import HttpError
from baton.services.gateway.openai.logprobs import Logprobs, PromptLogprobs
from baton.v1 import types_pb2

FINISH_REASONS = {
    types_pb2.FINISH_REASON_STOP: "stop",
    types_pb2.FINISH_REASON_LENGTH: "length",
}
DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Call:
    """A call of a tool as far as it has come. `arguments`: JSON, or what the model wrote for it."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Choice:
    """One answer as far as it has come."""

    prompt: int = 0
    """Which of the request's prompts it answers."""
    parser: AnswerParser = field(default_factory=PlainParser)
    parts: list[Part] = field(default_factory=list)
    """Of an answer that is not streamed."""
    token_ids: list[int] = field(default_factory=list)
    has_calls: bool = False
    finish_reason: str | None = None
    stop: str | None = None
    """The stop string that ended it."""
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0
    has_prediction: bool = False
    num_accepted_prediction_tokens: int = 0
    num_rejected_prediction_tokens: int = 0
    logprobs: Logprobs | None = None
    """Of tokens that came, as far as they were not told; None: nobody asks for them."""
    prompt_logprobs: PromptLogprobs | None = None

    @property
    def content(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Content))

    @property
    def reasoning(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Reasoning))

    @property
    def calls(self) -> list[Call]:
        begun = [part for part in self.parts if isinstance(part, ToolCall)]
        written: list[list[str]] = [[] for _ in begun]
        for part in self.parts:
            if isinstance(part, Arguments):
                written[part.index].append(part.text)
        return [
            Call(call.id, call.name, "".join(texts))
            for call, texts in zip(begun, written, strict=True)
        ]


class Wire(Protocol):
    """The form of one request's answer. `index`: of the choice. Streams are server-sent events, of
    which each method returns none, one or several."""

    @property
    def follows(self) -> bool:
        """Whether `came` is called of an answer that is not streamed, too, and says nothing then;
        else its choices have all parts once it is whole."""

    def started(self, index: int, choice: Choice) -> bytes: ...

    def came(
        self, index: int, choice: Choice, parts: Sequence[Part], token_ids: Sequence[int]
    ) -> bytes:
        """Parts may be none: text lags behind tokens."""

    def finished(self, index: int, choice: Choice) -> bytes:
        """`choice` has its finish_reason now."""

    def ended(self, choices: Sequence[Choice]) -> bytes:
        """After all choices."""

    def failed(self, error: HttpError) -> bytes:
        """In place of all that would still come."""

    def whole(self, choices: Sequence[Choice]) -> bytes:
        """The body of an answer that is not streamed."""


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    # A prompt counts once, however many samples answer it.
    prompts = {choice.prompt: choice for choice in choices}.values()
    num_prompt = sum(choice.num_prompt_tokens for choice in prompts)
    num_completion = sum(choice.num_completion_tokens for choice in choices)
    num_cached = sum(choice.num_cached_tokens for choice in prompts)
    num_reasoning = sum(choice.parser.num_reasoning_tokens for choice in choices)
    told = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
    details = {"reasoning_tokens": num_reasoning} if num_reasoning else {}
    if any(choice.has_prediction for choice in choices):
        accepted = sum(choice.num_accepted_prediction_tokens for choice in choices)
        rejected = sum(choice.num_rejected_prediction_tokens for choice in choices)
        details["accepted_prediction_tokens"] = accepted
        details["rejected_prediction_tokens"] = rejected
    if details:
        told["completion_tokens_details"] = details
    return told


class OpenAiWire:
    """`is_chat`: in the form of /v1/chat/completions, else of /v1/completions."""

    follows = False

    def __init__(
        self,
        request_id: str,
        model: str,
        *,
        is_chat: bool,
        says_usage: bool = False,
        says_usage_always: bool = False,
        says_tokens: bool = False,
    ) -> None:
        self._is_chat = is_chat
        self._says_usage = says_usage
        self._says_usage_always = says_usage_always
        self._says_tokens = says_tokens
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{request_id}",
            "object": "",
            "created": int(time.time()),
            "model": model,
        }
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        head = json.dumps({**self._head, "object": kind})[:-1]
        self._chunk_head = f'data: {head}, "choices": [{{"index": '
        self._usage_head = f'data: {head}, "choices": [], "usage": '
        self._no_text = ', "delta": {}' if is_chat else ', "text": ""'
        # Clients that asked for usage find the field in every chunk.
        self._no_usage = ', "usage": null' if says_usage else ""

    def started(self, index: int, choice: Choice) -> bytes:
        """A chat's first chunk names the role; nothing for completions."""
        if not self._is_chat:
            return b""
        delta = '"delta": {"role": "assistant", "content": ""}, "logprobs": null'
        body = f'{index}, {delta}, "finish_reason": null}}]{self._no_usage}}}\n\n'
        return (self._chunk_head + body).encode()

    def came(
        self, index: int, choice: Choice, parts: Sequence[Part], token_ids: Sequence[int]
    ) -> bytes:
        texts = [self._text(part) for part in parts]
        if not texts:
            says_more = self._says_usage_always or self._says_tokens or choice.logprobs is not None
            if not says_more:
                # The text is held back: it comes with a later token.
                return b""
            texts = [self._text(Content(""))]
        first, *rest = texts
        events = [self._chunk(index, choice, first, token_ids=token_ids)]
        events += [self._chunk(index, choice, text) for text in rest]
        return b"".join(events)

    def finished(self, index: int, choice: Choice) -> bytes:
        # By itself: some clients take no text from the event that has the reason.
        return self._chunk(index, choice, self._no_text, finish_reason=choice.finish_reason)

    def ended(self, choices: Sequence[Choice]) -> bytes:
        if not self._says_usage:
            return DONE
        return f"{self._usage_head}{json.dumps(usage(choices))}}}\n\n".encode() + DONE

    def failed(self, error: HttpError) -> bytes:
        return b"data: " + error.body() + b"\n\n"

    def whole(self, choices: Sequence[Choice]) -> bytes:
        kind = "chat.completion" if self._is_chat else "text_completion"
        head = json.dumps({**self._head, "object": kind, "usage": usage(choices)})[:-1]
        shown = ", ".join(self._whole_choice(*numbered) for numbered in enumerate(choices))
        of_prompt = self._prompt_logprobs(choices[0]) if self._is_chat else ""
        return f'{head}, "choices": [{shown}]{of_prompt}}}'.encode()

    def _text(self, part: Part) -> str:
        """The field of a choice that has it, in ASCII: some clients end a line at U+2028."""
        match part:
            case Content(text) if self._is_chat:
                return f', "delta": {{"content": {json.dumps(text)}}}'
            case Content(text):
                return f', "text": {json.dumps(text)}'
            case Reasoning(text):
                return f', "delta": {{"reasoning_content": {json.dumps(text)}}}'
            case ToolCall(index, call_id, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": call_id, "type": "function", "function": function}
            case Arguments(index, text):
                call = {"index": index, "function": {"arguments": text}}
        return f', "delta": {{"tool_calls": [{json.dumps(call)}]}}'

    def _chunk(
        self,
        index: int,
        choice: Choice,
        text: str,
        *,
        token_ids: Sequence[int] = (),
        finish_reason: str | None = None,
    ) -> bytes:
        """One server-sent event."""
        logprobs = "null" if choice.logprobs is None else choice.logprobs.take()
        parts = [self._chunk_head, str(index), text, f', "logprobs": {logprobs}']
        if self._says_tokens:
            parts.append(f', "token_ids": {json.dumps(list(token_ids))}')
        reason = "null" if finish_reason is None else f'"{finish_reason}"'
        parts.append(f', "finish_reason": {reason}}}]')
        if self._says_usage_always:
            parts.append(f', "usage": {json.dumps(usage([choice]))}')
        else:
            parts.append(self._no_usage)
        parts.append("}\n\n")
        return "".join(parts).encode()

    def _whole_choice(self, index: int, choice: Choice) -> str:
        entry: dict[str, Any] = {"index": index}
        if self._is_chat:
            entry["message"] = _message(choice)
        else:
            entry["text"] = choice.content
        entry["finish_reason"] = choice.finish_reason
        if self._says_tokens:
            entry["token_ids"] = choice.token_ids
        # These are JSON already.
        logprobs = "null" if choice.logprobs is None else choice.logprobs.take()
        of_prompt = "" if self._is_chat else self._prompt_logprobs(choice)
        return f'{json.dumps(entry)[:-1]}, "logprobs": {logprobs}{of_prompt}}}'

    def _prompt_logprobs(self, choice: Choice) -> str:
        """vLLM has them in each choice of a completion, and beside the one of a chat."""
        if choice.prompt_logprobs is None:
            return ""
        return f', "prompt_logprobs": {choice.prompt_logprobs.json()}'


def _message(choice: Choice) -> dict[str, Any]:
    calls, reasoning = choice.calls, choice.reasoning
    message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["content"] = message["content"] or None
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in calls
        ]
    return message
