"""What an answer looks like: completions and chats, whole and as chunks.

A chunk is put together from text that does not change: this runs once per token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from baton.v1 import types_pb2

FINISH_REASONS = {
    types_pb2.FINISH_REASON_STOP: "stop",
    types_pb2.FINISH_REASON_LENGTH: "length",
}
DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Choice:
    """One prompt's answer as far as it has come."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0
    has_prediction: bool = False
    num_accepted_prediction_tokens: int = 0
    num_rejected_prediction_tokens: int = 0


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    num_prompt = sum(choice.num_prompt_tokens for choice in choices)
    num_completion = sum(choice.num_completion_tokens for choice in choices)
    num_cached = sum(choice.num_cached_tokens for choice in choices)
    told = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
    if any(choice.has_prediction for choice in choices):
        accepted = sum(choice.num_accepted_prediction_tokens for choice in choices)
        rejected = sum(choice.num_rejected_prediction_tokens for choice in choices)
        told["completion_tokens_details"] = {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": rejected,
        }
    return told


class Wire:
    """For one request. `is_chat`: in the form of /v1/chat/completions, else of /v1/completions."""

    def __init__(
        self, request_id: str, model: str, *, is_chat: bool, says_usage: bool, says_tokens: bool
    ) -> None:
        self._is_chat = is_chat
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
        self._before_text = ', "delta": {"content": ' if is_chat else ', "text": '
        self._after_text = '}, "logprobs": null' if is_chat else ', "logprobs": null'
        # Clients that asked for usage find the field in every chunk.
        self._no_usage = ', "usage": null' if says_usage else ""

    def chunk(
        self,
        index: int,
        text: str,
        *,
        token_ids: Sequence[int] = (),
        finish_reason: str | None = None,
        usage: dict[str, Any] | None = None,
    ) -> bytes:
        """One server-sent event."""
        # Escaped to ASCII: some clients end a line at U+2028.
        parts = [self._chunk_head, str(index)]
        if text or finish_reason is None or not self._is_chat:
            parts += [self._before_text, json.dumps(text), self._after_text]
        else:
            parts.append(', "delta": {}, "logprobs": null')
        if self._says_tokens:
            parts.append(f', "token_ids": {json.dumps(list(token_ids))}')
        reason = "null" if finish_reason is None else f'"{finish_reason}"'
        parts.append(f', "finish_reason": {reason}}}]')
        parts.append(self._no_usage if usage is None else f', "usage": {json.dumps(usage)}')
        parts.append("}\n\n")
        return "".join(parts).encode()

    def first_chunk(self, index: int) -> bytes:
        """A chat's first chunk names the role; nothing for completions."""
        if not self._is_chat:
            return b""
        delta = '"delta": {"role": "assistant", "content": ""}, "logprobs": null'
        body = f'{index}, {delta}, "finish_reason": null}}]{self._no_usage}}}\n\n'
        return (self._chunk_head + body).encode()

    def usage_chunk(self, choices: Sequence[Choice]) -> bytes:
        return f"{self._usage_head}{json.dumps(usage(choices))}}}\n\n".encode()

    def whole(self, choices: Sequence[Choice]) -> bytes:
        kind = "chat.completion" if self._is_chat else "text_completion"
        body = {
            **self._head,
            "object": kind,
            "choices": [self._whole_choice(index, choice) for index, choice in enumerate(choices)],
            "usage": usage(choices),
        }
        return json.dumps(body).encode()

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.texts)
        entry: dict[str, Any] = {"index": index}
        if self._is_chat:
            entry["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            entry["text"] = text
        entry |= {"logprobs": None, "finish_reason": choice.finish_reason}
        if self._says_tokens:
            entry["token_ids"] = choice.token_ids
        return entry
