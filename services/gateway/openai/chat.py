"""/v1/chat/completions: messages become one prompt by the model's own template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from baton.services.gateway.admission import ChatPrompt
from baton.services.gateway.answer_parts import PLAIN, Reading
from baton.services.gateway.frontend import Frontend
from baton.services.gateway.openai.chat_constraint import chat_constraint, constraint_names
from baton.services.gateway.openai.constraint import Asked, asked_constraint, asked_field
from baton.services.gateway.openai.content import PREDICTION, prediction_of, text_of
from baton.services.gateway.openai.errors import InvalidParam
from baton.services.gateway.openai.schema import ChatRequest, Message, Templated
from baton.services.gateway.openai.template_switches import switches
from baton.services.gateway.openai.tools import (
    OfferedTools,
    arguments_nesting,
    offered_tools,
    template_calls,
)
from baton.shared.answer_formats import NONE
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2

_ROLES = ("system", "developer", "user", "assistant", "tool")
_REASONING = ("reasoning_content", "reasoning")


class Form(NamedTuple):
    """What may be asked of an answer's form, beside sampling."""

    asked: Asked
    tools: OfferedTools


def form_of(request: ChatRequest) -> Form:
    """Raises InvalidParam. Once for each request: see `asked_constraint`."""
    return Form(asked_constraint(request), tools_of(request))


def chat_fields(request: ChatRequest, form: Form) -> dict[str, str]:
    """What this request calls the fields of GenerateRequest."""
    names = {"text": "messages", "token_ids": "messages", **PREDICTION}
    names["sampling.logprobs"] = "top_logprobs"
    if request.max_completion_tokens is not None:
        names["sampling.max_tokens"] = "max_completion_tokens"
    return names | constraint_names(form.asked, form.tools)


@dataclass(frozen=True)
class Chat:
    """A chat as the gateway takes it, and how its answer is to be read."""

    request: pb.GenerateRequest
    reading: Reading = PLAIN


async def prepared_chat(request: ChatRequest, form: Form, frontend: Frontend) -> Chat:
    """Raises InvalidParam and BatonErrors."""
    sampling = request.sampling(frontend.cluster.limits().vocab_size)
    prediction = prediction_of(request.prediction)
    asked, tools = form.asked.constraint, form.tools
    if tools.must_call and request.response_format is not None:
        # That is the form of what is said, and calls say nothing.
        asked = None
    if request.continue_final_message:
        _refuse_forms(request, asked, tools)
    prompt = await rendered_prompt(request, request.messages, tools, frontend)
    constrained = chat_constraint(asked, tools, prompt.text, frontend.chat_format)
    is_length_given = sampling.HasField("max_tokens")
    if not is_length_given:
        default = 0 if request.asks_for_all else frontend.defaults.sampling.max_tokens
        sampling.max_tokens = default or frontend.cluster.limits().max_model_len
    return Chat(
        pb.GenerateRequest(
            token_ids=pb.TokenIds(token_ids=prompt.token_ids),
            sampling=sampling,
            # What goes on with a message is no text of its own.
            standalone_text=not request.continue_final_message,
            clamp_max_tokens=not is_length_given,
            prediction=prediction,
            n=request.n,
            constraint=constrained.constraint,
        ),
        frontend.chat_format.reading(
            prompt.text,
            tools.schemas,
            is_parallel=tools.is_parallel,
            is_constrained=constrained.has_calls,
        ),
    )


def _refuse_forms(
    request: ChatRequest, asked: types_pb2.Constraint | None, tools: OfferedTools
) -> None:
    """A form is that of a whole answer, and of one that is continued a part is there, which nothing
    has checked. Raises InvalidParam."""
    if tools.must_call:
        path = "tool_choice"
    elif asked is not None:
        path = asked_field(request)
    elif tools.is_strict:
        index = next(i for i, function in enumerate(tools.functions) if function.strict)
        path = f"tools[{index}].function.strict"
    else:
        return
    problem = "does not go with a message that is continued: it is for whole answers"
    raise InvalidParam(path, problem)


def tools_of(request: Templated) -> OfferedTools:
    """Raises InvalidParam."""
    is_parallel = request.parallel_tool_calls is not False
    return offered_tools(request.tools, request.tool_choice, is_parallel=is_parallel)


async def rendered_prompt(
    request: Templated, messages: Sequence[Message], tools: OfferedTools, frontend: Frontend
) -> ChatPrompt:
    """Raises InvalidParam and BatonErrors."""
    template = (frontend.codec.chat_template if frontend.codec else None) or ""
    if tools.functions and frontend.chat_format.tools == NONE:
        problem = "are not supported: how this model writes calls is not known (--tool-format)"
        raise InvalidParam("tools", problem, code="unsupported_parameter")
    continues = bool(request.continue_final_message)
    if continues and request.add_generation_prompt:
        raise InvalidParam("continue_final_message", "and add_generation_prompt exclude each other")
    if continues and messages[-1].tool_calls:
        problem = "has calls of tools, which nothing goes on with: only text is continued"
        raise InvalidParam(f"messages[{len(messages) - 1}]", problem)
    return await frontend.chat_prompt(
        template_messages(messages, template),
        add_generation_prompt=request.add_generation_prompt is not False and not continues,
        continue_final_message=continues,
        # The template puts them in.
        add_special_tokens=bool(request.add_special_tokens),
        tools=tools.for_template(),
        variables=switches(request.chat_template_kwargs, request.reasoning_effort, template),
    )


def template_messages(messages: Sequence[Message], template: str) -> list[dict[str, Any]]:
    """As templates take them: content is text, or a list of parts that are. Raises InvalidParam
    for what is no text, and for what has no meaning in its role."""
    # It is the newer name of `system`, which few templates know.
    knows_developer = "developer" in template
    rendered, nesting = [], arguments_nesting()
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        if message.role not in _ROLES:
            problem = f"is not supported; choose from {', '.join(_ROLES)}"
            raise InvalidParam(f"{path}.role", problem)
        is_call, is_answer = message.role == "assistant", message.role == "tool"
        for field, is_in_place in (
            *(("tool_calls", is_call), ("tool_call_id", is_answer)),
            *(("function_call", False), ("images", False), ("audio", False)),
        ):
            if getattr(message, field) and not is_in_place:
                raise InvalidParam(
                    f"{path}.{field}", "is not supported", code="unsupported_parameter"
                )
        is_system = message.role == "developer" and not knows_developer
        entry = {
            "role": "system" if is_system else message.role,
            "content": _content(message, f"{path}.content"),
            "name": message.name,
        }
        if message.tool_calls:
            calls = template_calls(message.tool_calls, f"{path}.tool_calls", nesting)
            entry["tool_calls"] = calls
        if message.tool_call_id:
            entry["tool_call_id"] = message.tool_call_id
        # Clients send what they got, in whatever shape.
        reasoning = {field: getattr(message, field) for field in _REASONING}
        entry |= {field: text for field, text in reasoning.items() if isinstance(text, str)}
        rendered.append(
            {
                field: value
                for field, value in entry.items()
                if value is not None or field == "content"
            }
        )
    return rendered


def _content(message: Message, path: str) -> str | list[dict[str, str]] | None:
    if message.content is None:
        if message.role == "assistant":
            return "" if not message.tool_calls else None
        raise InvalidParam(path, "is missing")
    if isinstance(message.content, str):
        return message.content
    return [
        {"type": "text", "text": text_of(part, f"{path}[{index}]")}
        for index, part in enumerate(message.content)
    ]
