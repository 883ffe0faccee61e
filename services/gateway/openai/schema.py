"""The fields of a request: their types, and which of them must keep their neutral value.

The sampling fields are those that shared/sampling.py declares. Ranges are not checked here, but
by admission.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import ErrorDetails

from baton.services.gateway.openai.errors import InvalidParam
from baton.services.gateway.openai.fields import Fields, Int, List
from baton.services.gateway.openai.tools import Function, MadeCall, Tool, check_tools
from baton.shared.sampling import ALL_TOKENS, FIELDS, Kind, SamplingField
from baton.v1 import types_pb2

_UINT32 = 2**32 - 1


def _token_of_key(key: Any) -> int:
    """JSON has keys of text only."""
    is_number = isinstance(key, str) and len(key) <= 10 and key.isascii() and key.isdigit()
    if is_number and str(int(key)) == key:
        return int(key)
    raise ValueError("should be a token id, as text")


_TokenKey = Annotated[int, BeforeValidator(_token_of_key), Field(le=_UINT32)]
MAX_ENTRIES = 4096
"""Of any list in a request but prompts, and of the content parts of all messages together."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # field: the values that ask for nothing; null is always one.
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "length_penalty": (1,),
    "typical_p": (1,),
    "logits_processors": ([],),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "echo": (False,),
    "prompt_embeds": (),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    # Templates come from the model's directory only.
    "chat_template": (),
    "documents": ([],),
    "kv_transfer_params": (),
    "cache_salt": (),
    "priority": (0,),
    "include_reasoning": (True,),
}
UNSUPPORTED = {
    name: values
    for name, values in _NEUTRAL.items()
    if name not in {field.public_name for field in FIELDS}
}
"""What Baton does not do yet. A name that is declared as a sampling field is supported."""


_LOGPROBS = next(field for field in FIELDS if field.name == "logprobs")


class StreamOptions(Fields):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


def _type_of(field: SamplingField) -> Any:
    """Of a sampling field in a body."""
    low, fewest = field.spelling.lowest, field.spelling.fewest
    match field.kind:
        case Kind.NUMBER:
            return float
        case Kind.COUNT | Kind.MAYBE_COUNT:
            return Annotated[Int, Field(ge=low, le=_UINT32)]
        case Kind.SEED:
            return Annotated[Int, Field(ge=low, lt=2**64)]
        case Kind.SWITCH:
            return bool
        case Kind.TOKEN_IDS:
            entries = Annotated[Int, Field(ge=0, le=_UINT32)]
            return Annotated[list[entries], Field(min_length=fewest, fail_fast=True)]
        case Kind.TEXTS:
            return str | List[str]
        case Kind.BIASES:
            return dict[_TokenKey, float]


if TYPE_CHECKING:

    class _WithSampling(Fields):
        max_tokens: int | None
        prompt_logprobs: int | None

else:
    _WithSampling = create_model(
        "_WithSampling",
        __base__=Fields,
        **{field.public_name: (_type_of(field) | None, None) for field in FIELDS},
    )


class ContentPart(Fields):
    type: str
    text: str | None = None


def _as_part(value: Any) -> Any:
    if isinstance(value, str):
        return {"type": "text", "text": value}
    if isinstance(value, dict) and value.get("type") is None:
        # vLLM takes these by their field alone.
        return {**value, "type": next((name for name in _PART_FIELDS if name in value), None)}
    return value


_Part = Annotated[ContentPart, BeforeValidator(_as_part)]
"""Some clients list texts as they are."""


class Prediction(Fields):
    """What the client expects the answer to be."""

    type: str
    content: str | List[_Part]


class Sampled(_WithSampling):
    """What completions and chats have in common, beside the sampling fields. None: not given."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    prediction: Prediction | None = None
    n: Int | None = Field(None, ge=0, le=_UINT32)
    # See constraint.py.
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: List[str] | None = None
    guided_grammar: str | None = None

    @property
    def asks_for_all(self) -> bool:
        """As many tokens as there is room for, whatever the default is."""
        return self.max_tokens == ALL_TOKENS

    def sampling(self, vocab_size: int) -> types_pb2.SamplingParams:
        """Only what was given is set: admission knows the defaults, and checks the ranges."""
        given = {field: self._given(field) for field in FIELDS}
        read = {
            field.name: field.spelling.read(value)
            for field, value in given.items()
            if value is not None
        }
        sampling = types_pb2.SamplingParams(
            **{name: value for name, value in read.items() if value is not None}
        )
        if sampling.top_k > vocab_size:
            # So clients say all of it, who do not know how large it is.
            sampling.top_k = 0
        return sampling

    @property
    def num_top_logprobs(self) -> int | None:
        """None: logprobs are not asked for. Raises InvalidParam."""
        num_top: int | None = self._given(_LOGPROBS)
        return num_top

    def _given(self, field: SamplingField) -> Any:
        return getattr(self, field.public_name)


def _none_if_false(value: Any) -> Any:
    """Some clients have one form for all, in which chats are asked."""
    return None if value is False else value


class CompletionRequest(Sampled):
    prompt: Any = None
    """Text, token ids, or a list of either: see completions.py."""
    echo: bool | None = None
    logprobs: Annotated[Int | None, BeforeValidator(_none_if_false)] = Field(None, ge=0, le=_UINT32)


_PART_FIELDS = (
    *("text", "image_url", "image_embeds", "image_pil", "input_image", "image"),
    *("input_audio", "audio_url", "audio", "video_url", "video", "input_file", "file"),
)


class Message(Fields):
    role: str
    content: str | List[_Part] | None = None
    name: str | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: List[MadeCall] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    images: Any = None
    audio: Any = None


class Templated(Fields):
    """What reaches the chat template, beside the messages."""

    tools: List[Tool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None


class ChatRequest(Sampled, Templated):
    messages: List[Message] = Field(min_length=1)
    max_completion_tokens: Int | None = Field(None, ge=ALL_TOKENS, le=_UINT32)
    logprobs: bool | None = None
    top_logprobs: Int | None = Field(None, ge=0, le=_UINT32)

    def _given(self, field: SamplingField) -> Any:
        if field is not _LOGPROBS:
            return super()._given(field)
        if self.top_logprobs and not self.logprobs:
            raise InvalidParam("top_logprobs", "needs logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _prefer_the_newer_name(self) -> Self:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self


class TokenizeRequest(Templated):
    model: str | None = None
    prompt: str | None = None
    messages: List[Message] | None = Field(None, min_length=1)
    return_token_strs: bool | None = None


class DetokenizeRequest(Fields):
    model: str | None = None
    tokens: List[Int]


_Request = TypeVar("_Request", bound=BaseModel)


def parse(kind: type[_Request], body: dict[str, Any]) -> _Request:
    """Raises InvalidParam naming the field."""
    _check_sizes(body)
    served = kind.model_fields.keys()
    check_neutral(body, {name: UNSUPPORTED[name] for name in UNSUPPORTED.keys() - served})
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise InvalidParam(_path(first["loc"]), problem_of(first)) from None


_MAPPINGS = [field.public_name for field in FIELDS if field.kind is Kind.BIASES]
_LISTS = ["messages", "guided_choice"] + [
    field.public_name for field in FIELDS if field.kind in (Kind.TEXTS, Kind.TOKEN_IDS)
]


def _check_sizes(body: dict[str, Any]) -> None:
    """Before anything walks them: a body holds a million small objects."""
    for field in (*_LISTS, *_MAPPINGS):
        entries = body.get(field)
        if isinstance(entries, list | dict) and len(entries) > MAX_ENTRIES:
            raise InvalidParam(field, f"has {len(entries)} entries; limit: {MAX_ENTRIES}")
    prediction = body.get("prediction")
    parts = prediction.get("content") if isinstance(prediction, dict) else None
    if isinstance(parts, list) and len(parts) > MAX_ENTRIES:
        problem = f"has {len(parts)} content parts; limit: {MAX_ENTRIES}"
        raise InvalidParam("prediction.content", problem)
    tools = body.get("tools")
    if isinstance(tools, list):
        check_tools(tools)
    messages = body.get("messages")
    if not isinstance(messages, list):
        return
    for field, what in (("content", "content parts"), ("tool_calls", "tool calls")):
        lists = [message.get(field) for message in messages if isinstance(message, dict)]
        num_parts = sum(len(parts) for parts in lists if isinstance(parts, list))
        if num_parts > MAX_ENTRIES:
            raise InvalidParam("messages", f"has {num_parts} {what}; limit: {MAX_ENTRIES}")


def check_neutral(body: dict[str, Any], unsupported: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises InvalidParam for a field that asks for something. `unsupported`: fields → the values
    that ask for nothing."""
    for field in body.keys() & unsupported.keys():
        value, neutral = body[field], unsupported[field]
        # 0 == False: they ask for different things.
        is_neutral = any(
            value == other and isinstance(value, bool) is isinstance(other, bool)
            for other in neutral
        )
        if value is not None and not is_neutral:
            raise InvalidParam(field, "is not supported", code="unsupported_parameter")


def _path(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "role")` → `messages[0].role`; the arms of unions are left out."""
    if location[0] in _MAPPINGS and len(location) > 1:
        return f"{location[0]}[{str(location[1])[:20]}]"
    path = ""
    for index, step in enumerate(location):
        if isinstance(step, int):
            path += f"[{step}]"
        elif index == 0:
            path = step
        elif step in _FIELD_NAMES:
            path += f".{step}"
    return path


_FIELD_NAMES = {"arguments"} | {
    name
    for kind in (StreamOptions, ContentPart, Prediction, Message, MadeCall, Tool, Function)
    for name in kind.model_fields
}


def problem_of(error: ErrorDetails) -> str:
    """What is wrong with a value, in words that go after its name."""
    if error["type"] == "missing":
        return "is missing"
    message = error["msg"].removeprefix("Value error, ")
    return message.replace("Input should", "should").replace("List should", "should")
