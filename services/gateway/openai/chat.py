"""/v1/chat/completions: messages become one prompt by the model's own template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from baton.services.gateway.answer_parts import PLAIN, Reading
from baton.services.gateway.frontend import Frontend
from baton.services.gateway.openai.constraint import asked_constraint
from baton.services.gateway.openai.content import PREDICTION, prediction_of, text_of
from baton.services.gateway.openai.errors import InvalidParam
from baton.services.gateway.openai.schema import ChatRequest, Message
from baton.v1 import inference_service_pb2 as pb

_ROLES = ("system", "developer", "user", "assistant")
_REASONING = ("reasoning_content", "reasoning")


def chat_fields(request: ChatRequest) -> dict[str, str]:
    """What this request calls the fields of GenerateRequest."""
    names = {"text": "messages", "token_ids": "messages", **PREDICTION}
    names["sampling.logprobs"] = "top_logprobs"
    if request.max_completion_tokens is not None:
        names["sampling.max_tokens"] = "max_completion_tokens"
    return names | asked_constraint(request).names


@dataclass(frozen=True)
class Chat:
    """A chat as the gateway takes it, and how its answer is to be read."""

    request: pb.GenerateRequest
    reading: Reading = PLAIN


async def prepared_chat(request: ChatRequest, frontend: Frontend) -> Chat:
    """Raises InvalidParam and BatonErrors."""
    sampling = request.sampling(frontend.cluster.limits().vocab_size)
    prediction = prediction_of(request.prediction)
    constraint = asked_constraint(request).constraint
    token_ids = await frontend.chat_prompt(
        template_messages(request.messages, frontend),
        add_generation_prompt=request.add_generation_prompt is not False,
        # The template puts them in.
        add_special_tokens=bool(request.add_special_tokens),
    )
    is_length_given = sampling.HasField("max_tokens")
    if not is_length_given:
        default = 0 if request.asks_for_all else frontend.defaults.sampling.max_tokens
        sampling.max_tokens = default or frontend.cluster.limits().max_model_len
    return Chat(
        pb.GenerateRequest(
            token_ids=pb.TokenIds(token_ids=token_ids),
            sampling=sampling,
            standalone_text=True,
            clamp_max_tokens=not is_length_given,
            prediction=prediction,
            n=request.n,
            constraint=constraint,
        )
    )


def template_messages(messages: Sequence[Message], frontend: Frontend) -> list[dict[str, Any]]:
    """As templates take them: content is text, or a list of parts that are. Raises InvalidParam
    for what is no text."""
    template = frontend.codec.chat_template if frontend.codec else None
    # It is the newer name of `system`, which few templates know.
    knows_developer = "developer" in (template or "")
    rendered = []
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        if message.role not in _ROLES:
            problem = f"is not supported; choose from {', '.join(_ROLES)}"
            raise InvalidParam(f"{path}.role", problem)
        for field in ("tool_calls", "function_call", "tool_call_id", "images", "audio"):
            if getattr(message, field):
                raise InvalidParam(
                    f"{path}.{field}", "is not supported", code="unsupported_parameter"
                )
        is_system = message.role == "developer" and not knows_developer
        entry = {
            "role": "system" if is_system else message.role,
            "content": _content(message, f"{path}.content"),
            "name": message.name,
        }
        # Clients send what they got, in whatever shape.
        reasoning = {field: getattr(message, field) for field in _REASONING}
        entry |= {field: text for field, text in reasoning.items() if isinstance(text, str)}
        rendered.append({field: value for field, value in entry.items() if value is not None})
    return rendered


def _content(message: Message, path: str) -> str | list[dict[str, str]]:
    if message.content is None:
        if message.role == "assistant":
            return ""
        raise InvalidParam(path, "is missing")
    if isinstance(message.content, str):
        return message.content
    return [
        {"type": "text", "text": text_of(part, f"{path}[{index}]")}
        for index, part in enumerate(message.content)
    ]
