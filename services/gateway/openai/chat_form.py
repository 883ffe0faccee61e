"""A request in the form of chat completions, made of one in another form.

    body ──► reading (each endpoint's own) ──► ChatForm ──► prepared ──► GenerateRequest

So tools, constraints, sampling fields and all of their checks are the same, whichever endpoint is
asked. An error names the field as the endpoint's own request has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from baton.services.gateway.frontend import Frontend
from baton.services.gateway.openai.chat import (
    Chat,
    chat_fields,
    form_of,
    prepared_chat,
    rendered_prompt,
)
from baton.services.gateway.openai.errors import HttpError, InvalidParam, renamed, to_http_error
from baton.services.gateway.openai.schema import (
    MAX_ENTRIES,
    UNSUPPORTED,
    ChatRequest,
    parse,
    problem_of,
)
from baton.shared.rpc.errors import BatonError
from baton.shared.sampling import FIELDS

_Model = TypeVar("_Model", bound=BaseModel)

_APART = {"max_tokens", "logprobs", "prompt_logprobs"}
_CONSTRAINTS = ("structured_outputs", "guided_json", "guided_regex", "guided_choice")
ALIKE = (
    *(field.public_name for field in FIELDS if field.public_name not in _APART),
    *(*_CONSTRAINTS, "guided_grammar", "chat_template_kwargs", "prediction"),
)
"""Fields that every endpoint calls the same."""
ELSEWHERE: dict[str, tuple[Any, ...]] = {
    # Of what no endpoint serves, too, nothing is left out without a word.
    **UNSUPPORTED,
    "response_format": ({"type": "text"},),
    "max_completion_tokens": (),
    "reasoning_effort": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "return_token_ids": (False,),
    # What the other endpoints' answers have no place for.
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
}
"""Chat completions' own fields, which mean another endpoint → the values that ask for nothing."""


@dataclass
class ChatForm:
    body: dict[str, Any] = field(default_factory=dict)
    """Of /v1/chat/completions."""
    places: dict[str, str] = field(default_factory=dict)
    """A path in it → where the endpoint's own request has that; see `renamed`."""
    messages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.body["messages"] = self.messages

    def set(self, name: str, value: Any, place: str) -> None:
        """None: it was not given."""
        if value is not None:
            self.body[name] = value
            self.places[name] = place

    def add(self, place: str, message: dict[str, Any], **places: str) -> None:
        """A message, which is at `place`; `places`: where its fields are, if not there by the same
        name."""
        path = f"messages[{len(self.messages)}]"
        self.places[path] = place
        self.places |= {f"{path}.{name}": where for name, where in places.items()}
        self.messages.append(message)

    def add_call(
        self, place: str, call_id: str, name: str, arguments: str, *, called: str = "arguments"
    ) -> None:
        """Of a tool, by the last message. `called`: what the endpoint calls the arguments."""
        calls = self.messages[-1].setdefault("tool_calls", [])
        path = f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}]"
        self.places |= {path: place, f"{path}.function": place}
        self.places[f"{path}.function.arguments"] = f"{place}.{called}"
        function = {"name": name, "arguments": arguments}
        calls.append({"id": call_id, "type": "function", "function": function})


@dataclass(frozen=True)
class Prepared:
    """What is asked of the frontend, and how its errors are told."""

    fields: ChatRequest
    chat: Chat
    names: dict[str, str]


async def prepared(form: ChatForm, frontend: Frontend) -> Prepared:
    """Raises HttpError in the endpoint's own names."""
    names: dict[str, str] = {}
    try:
        fields = parse(ChatRequest, form.body)
        asked = form_of(fields)
        names = chat_fields(fields, asked)
        return Prepared(fields, await prepared_chat(fields, asked, frontend), names)
    except (HttpError, BatonError) as error:
        raise renamed(to_http_error(error, names), form.places) from error


async def num_prompt_tokens(form: ChatForm, frontend: Frontend) -> int:
    """Raises as `prepared` does."""
    names: dict[str, str] = {}
    try:
        fields = parse(ChatRequest, form.body)
        asked = form_of(fields)
        names = chat_fields(fields, asked)
        prompt = await rendered_prompt(fields, fields.messages, asked.tools, frontend)
    except (HttpError, BatonError) as error:
        raise renamed(to_http_error(error, names), form.places) from error
    return len(prompt.token_ids)


def take_alike(body: Mapping[str, Any], form: ChatForm) -> None:
    """Takes over what all endpoints call the same; it is checked with the rest."""
    for name in ALIKE:
        form.set(name, body.get(name), name)


def read(kind: type[_Model], value: Any, path: str = "") -> _Model:
    """`value` as a `kind`. Raises InvalidParam naming the field; `path` is that of `value`."""
    if not isinstance(value, dict):
        raise InvalidParam(path, "must be an object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise InvalidParam(_below(path, first["loc"]), problem_of(first)) from None


def check_entries(value: Any, path: str) -> None:
    """Before anything walks a list: a body holds a million small objects. Raises InvalidParam."""
    if isinstance(value, list) and len(value) > MAX_ENTRIES:
        raise InvalidParam(path, f"has {len(value)} entries; limit: {MAX_ENTRIES}")


def check_contents(items: Sequence[Any], path: str) -> None:
    """Of all items together, of which each may have a list of parts. Raises InvalidParam."""
    check_entries(items, path)
    contents = [item.get("content") for item in items if isinstance(item, dict)]
    num_parts = sum(len(content) for content in contents if isinstance(content, list))
    if num_parts > MAX_ENTRIES:
        raise InvalidParam(path, f"has {num_parts} content parts; limit: {MAX_ENTRIES}")


def unsupported(path: str, found: Any, supported: str) -> InvalidParam:
    """A kind of thing that is known, perhaps, and not served here."""
    problem = f"{str(found)[:60]!r} is not supported; only {supported}"
    return InvalidParam(path, problem, code="unsupported_parameter")


def _below(path: str, location: tuple[int | str, ...]) -> str:
    """The arms of unions, which pydantic names by their types, are left out."""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step.isidentifier() and step not in _ARMS:
            path += f".{step}" if path else step
    return path


_ARMS = {"str", "dict", "bool", "int", "float", "list"}
