"""The fields of a request: their types, and which of them must keep their neutral value.

Ranges are not checked here: services/gateway/admission.py has the one table of limits.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baton.services.gateway.openai.errors import InvalidParam

_Entry = TypeVar("_Entry")
# The first wrong entry is all that the client hears of: a million of them would take seconds.
_List = Annotated[list[_Entry], Field(fail_fast=True)]

_UINT32 = 2**32 - 1
_MAX_ENTRIES = 4096
"""Of a list in a request, prompts apart; of all messages' content parts together."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # field: the values that ask for nothing; null is always one.
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "length_penalty": (1, 1.0),
    "logit_bias": ({},),
    "typical_p": (1, 1.0),
    "min_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structural_tag": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "echo": (False,),
    "prompt_embeds": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
    "continue_final_message": (False,),
    # Templates come from the model's directory only.
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "kv_transfer_params": (),
    "cache_salt": (),
    "priority": (0,),
}
"""What the engine does not do yet."""


class _Fields(BaseModel):
    # Strict: "16" is no number. Unknown fields are other servers' and ignored.
    model_config = ConfigDict(extra="ignore", strict=True)


class StreamOptions(_Fields):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampled(_Fields):
    """What completions and chats have in common. None: not given."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0, le=_UINT32)
    temperature: float | None = None
    top_p: float | None = None
    # -1 is off, too.
    top_k: int | None = Field(None, ge=-1, le=_UINT32)
    min_p: float | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | _List[str] | None = None
    stop_token_ids: _List[Annotated[int, Field(ge=0, le=_UINT32)]] | None = None
    ignore_eos: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None


class CompletionRequest(Sampled):
    prompt: Any = None
    """Text, token ids, or a list of either: see completions.py."""


class ContentPart(_Fields):
    type: str
    text: str | None = None


class Message(_Fields):
    role: str
    content: str | _List[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None
    tool_call_id: Any = None


class ChatRequest(Sampled):
    messages: _List[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0, le=_UINT32)
    add_generation_prompt: bool | None = None


class TokenizeRequest(_Fields):
    model: str | None = None
    prompt: str | None = None
    messages: _List[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Fields):
    model: str | None = None
    tokens: _List[int]


_Request = TypeVar("_Request", bound=BaseModel)


def parse(kind: type[_Request], body: dict[str, Any]) -> _Request:
    """Raises InvalidParam naming the field."""
    _check_sizes(body)
    _check_neutral(body)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise InvalidParam(_path(first["loc"]), _problem(first["type"], first["msg"])) from None


def _check_sizes(body: dict[str, Any]) -> None:
    """Before anything walks them: a body holds a million small objects."""
    for field in ("messages", "stop", "stop_token_ids"):
        entries = body.get(field)
        if isinstance(entries, list) and len(entries) > _MAX_ENTRIES:
            raise InvalidParam(field, f"has {len(entries)} entries; limit: {_MAX_ENTRIES}")
    messages = body.get("messages")
    if not isinstance(messages, list):
        return
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    num_parts = sum(len(content) for content in contents if isinstance(content, list))
    if num_parts > _MAX_ENTRIES:
        raise InvalidParam("messages", f"has {num_parts} content parts; limit: {_MAX_ENTRIES}")


def _check_neutral(body: dict[str, Any]) -> None:
    for field in body.keys() & UNSUPPORTED.keys():
        value, neutral = body[field], UNSUPPORTED[field]
        # 0 == False: they ask for different things.
        is_neutral = any(value == other and type(value) is type(other) for other in neutral)
        if value is not None and not is_neutral:
            raise InvalidParam(field, "is not supported", code="unsupported_parameter")


def _path(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "role")` → `messages[0].role`; the arms of unions are left out."""
    path = ""
    for index, step in enumerate(location):
        if isinstance(step, int):
            path += f"[{step}]"
        elif index == 0:
            path = step
        elif step in _FIELD_NAMES:
            path += f".{step}"
    return path


_FIELD_NAMES = {
    name for kind in (StreamOptions, ContentPart, Message) for name in kind.model_fields
}


def _problem(kind: str, message: str) -> str:
    if kind == "missing":
        return "is missing"
    return message.replace("Input should", "should").replace("List should", "should")
