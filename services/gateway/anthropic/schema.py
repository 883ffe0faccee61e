"""The fields of a request to /v1/messages, and what of it is not served here.

Sampling fields are those of chat completions, and checked with them.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from baton.services.gateway.openai.chat_form import ELSEWHERE
from baton.services.gateway.openai.fields import Fields, Int, List

_KEEP_ALL = {"type": "clear_thinking_20251015", "keep": "all"}
"""Coding agents send it: no thinking block is to be left out."""
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # field: the values that ask for nothing; null is always one.
    **ELSEWHERE,
    "container": (),
    "mcp_servers": ([],),
    "thread": (),
    "context_management": ({}, {"edits": []}, {"edits": [_KEEP_ALL]}),
    "compaction": (),
    "parallel_tool_calls": (True,),
    "stop": ([], ""),
}


class Thinking(Fields):
    type: str
    budget_tokens: Int | None = Field(None, ge=1)
    display: str | None = None


class OutputConfig(Fields):
    effort: str | None = None
    format: dict[str, Any] | None = None
    task_budget: Any = None


class ToolChoice(Fields):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Prompt(Fields):
    """What count_tokens takes, too."""

    model: str | None = None
    messages: list[Any] = Field(min_length=1)
    system: str | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = None
    """The older name of `output_config.format`."""


class MessagesRequest(Prompt):
    max_tokens: Int = Field(ge=1, lt=2**32)
    stop_sequences: List[str] | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None


class Message(Fields):
    role: str
    content: str | list[Any]


class TextBlock(Fields):
    text: str


class ThinkingBlock(Fields):
    thinking: str


class ToolUseBlock(Fields):
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(Fields):
    tool_use_id: str
    content: str | list[Any] | None = None
    is_error: bool | None = None


class Tool(Fields):
    type: str | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
