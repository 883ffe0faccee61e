"""The fields of a request to /v1/responses, and what of it is not served here.

Sampling fields are those of chat completions, and checked with them.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from baton.services.gateway.openai.chat_form import ELSEWHERE
from baton.services.gateway.openai.fields import Fields, Int, List

_SERVED = ("top_logprobs",)
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # field: the values that ask for nothing; null is always one.
    **{name: values for name, values in ELSEWHERE.items() if name not in _SERVED},
    "background": (False,),
    "conversation": (),
    "previous_response_id": (),
    "prompt": (),
    "truncation": ("disabled",),
    "context_management": ([],),
    "moderation": (),
    "image": (),
    "messages": (),
    "max_tokens": (),
}
LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = {
    LOGPROBS,
    # Of tools that are not served, and of images: there is nothing to include.
    *("file_search_call.results", "web_search_call.results", "web_search_call.action.sources"),
    *("message.input_image.image_url", "computer_call_output.output.image_url"),
    "code_interpreter_call.outputs",
    # Reasoning is told as it is, so that clients can send it back.
    "reasoning.encrypted_content",
}
MAX_METADATA = 16
MAX_KEY, MAX_VALUE = 64, 512


class TextOptions(Fields):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ReasoningOptions(Fields):
    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(Fields):
    model: str | None = None
    stream: bool | None = None
    input: str | list[Any] | None = None
    instructions: str | None = None
    max_output_tokens: Int | None = Field(None, ge=1, lt=2**32)
    max_tool_calls: Int | None = None
    metadata: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: List[str] | None = None
    top_logprobs: Int | None = Field(None, ge=0)
    store: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class MessageItem(Fields):
    role: str
    content: str | list[Any]


class CallItem(Fields):
    call_id: str
    name: str
    arguments: str


class CallOutputItem(Fields):
    call_id: str
    output: str | list[Any]


class ReasoningItem(Fields):
    content: list[Any] | None = None
    summary: list[Any] | None = None


class ContentPart(Fields):
    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionTool(Fields):
    type: str
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenTool(Fields):
    """Of `tool_choice`."""

    type: str
    name: str | None = None
    mode: str | None = None
    tools: list[Any] | None = None
