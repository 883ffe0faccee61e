"""A request to /v1/messages in the form of chat completions."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from baton.services.gateway.anthropic.schema import (
    UNSUPPORTED,
    Message,
    MessagesRequest,
    OutputConfig,
    Prompt,
    TextBlock,
    ThinkingBlock,
    Tool,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
)
from baton.services.gateway.chat_template import template_variables
from baton.services.gateway.openai.chat_form import (
    ChatForm,
    check_contents,
    check_entries,
    read,
    take_alike,
    unsupported,
)
from baton.services.gateway.openai.errors import InvalidParam
from baton.services.gateway.openai.schema import check_neutral

_ROLES = ("user", "assistant", "system")
_THINKING = ("enabled", "disabled", "adaptive", "between_tools")
_SWITCHES = frozenset({"enable_thinking", "thinking"})
"""What templates call the switch for reasoning."""

_ERROR = "Error: "
_SAYS_ERROR = re.compile(r"\A\W*\w*error", re.IGNORECASE)
"""`<tool_use_error>`, `ValueError: …`, `error[E0308]`"""

_Kind = TypeVar("_Kind", bound=Prompt)


def prompt_request(kind: type[_Kind], body: dict[str, Any]) -> _Kind:
    """Raises InvalidParam."""
    check_neutral(body, UNSUPPORTED)
    for name in ("messages", "system", "tools", "stop_sequences"):
        check_entries(body.get(name), name)
    return read(kind, body)


def chat_form(fields: Prompt, body: dict[str, Any], template: str | None) -> ChatForm:
    """`template`: the model's own. Raises InvalidParam."""
    form = ChatForm()
    take_alike(body, form)
    if isinstance(fields, MessagesRequest):
        form.set("max_tokens", fields.max_tokens, "max_tokens")
        form.set("stop", fields.stop_sequences, "stop_sequences")
    _read_thinking(fields, form, template or "")
    _read_output(fields, form)
    _read_tools(fields, form)
    if fields.system is not None:
        content = _texts(fields.system, "system")
        form.add("system", {"role": "system", "content": content}, content="system")
    check_contents(fields.messages, "messages")
    for index, value in enumerate(fields.messages):
        _read_message(read(Message, value, f"messages[{index}]"), f"messages[{index}]", form)
    if form.messages[-1]["role"] == "assistant":
        form.set("continue_final_message", True, f"messages[{len(fields.messages) - 1}]")
    return form


def _read_thinking(fields: Prompt, form: ChatForm, template: str) -> None:
    if fields.thinking is None:
        return
    kind = fields.thinking.type
    if kind not in _THINKING:
        problem = f"is not supported; choose from {', '.join(_THINKING)}"
        raise InvalidParam("thinking.type", problem)
    if kind in ("enabled", "disabled"):
        # Otherwise, and where the template has no switch, the model does as it was made to.
        switches = dict.fromkeys(_SWITCHES & template_variables(template), kind == "enabled")
        given = form.body.get("chat_template_kwargs", {})
        if switches and isinstance(given, dict):
            form.set("chat_template_kwargs", switches | given, "chat_template_kwargs")


def _read_output(fields: Prompt, form: ChatForm) -> None:
    config = fields.output_config or OutputConfig()
    if config.task_budget is not None:
        path = "output_config.task_budget"
        raise InvalidParam(path, "is not supported", code="unsupported_parameter")
    form.set("reasoning_effort", config.effort, "output_config.effort")
    if fields.output_format is not None and config.format is not None:
        raise InvalidParam("output_format", "is given beside output_config.format: choose one")
    place = "output_config.format" if fields.output_format is None else "output_format"
    given = config.format or fields.output_format
    if given is None:
        return
    if given.get("type") != "json_schema":
        raise unsupported(f"{place}.type", given.get("type"), "'json_schema' is")
    named = {"name": "output", "schema": given.get("schema"), "strict": True}
    form.set("response_format", {"type": "json_schema", "json_schema": named}, place)
    form.places["response_format.json_schema"] = place


def _read_tools(fields: Prompt, form: ChatForm) -> None:
    functions = []
    for index, value in enumerate(fields.tools or ()):
        path = f"tools[{index}]"
        if isinstance(value, dict) and value.get("type") not in (None, "custom"):
            raise unsupported(f"{path}.type", value["type"], "'custom' is")
        tool = read(Tool, value, path)
        function = {
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.input_schema,
            "strict": tool.strict,
        }
        given = {name: value for name, value in function.items() if value is not None}
        functions.append({"type": "function", "function": given})
        form.places[f"{path}.function"] = path
        form.places[f"{path}.function.parameters"] = f"{path}.input_schema"
    form.set("tools", functions or None, "tools")
    if fields.tool_choice is not None:
        form.set("tool_choice", _choice(fields.tool_choice), "tool_choice")
        form.places["tool_choice.function"] = "tool_choice"
        if fields.tool_choice.disable_parallel_tool_use:
            place = "tool_choice.disable_parallel_tool_use"
            form.set("parallel_tool_calls", False, place)


def _choice(choice: ToolChoice) -> str | dict[str, Any]:
    match choice.type:
        case "auto" | "none":
            return choice.type
        case "any":
            return "required"
        case "tool":
            if choice.name is None:
                raise InvalidParam("tool_choice.name", "is missing")
            return {"type": "function", "function": {"name": choice.name}}
        case other:
            raise unsupported("tool_choice.type", other, "auto, any, tool and none are")


def _read_message(message: Message, path: str, form: ChatForm) -> None:
    match message.role:
        case "user":
            _read_user(message, path, form)
        case "assistant":
            _read_assistant(message, path, form)
        case "system":
            content = _texts(message.content, f"{path}.content")
            form.add(path, {"role": "system", "content": content})
        case _:
            problem = f"is not supported; choose from {', '.join(_ROLES)}"
            raise InvalidParam(f"{path}.role", problem)


def _read_user(message: Message, path: str, form: ChatForm) -> None:
    """Results of tools are messages of their own in a chat."""
    if isinstance(message.content, str):
        form.add(path, {"role": "user", "content": message.content})
        return
    if not message.content:
        raise InvalidParam(f"{path}.content", "is empty")
    texts: list[dict[str, str]] = []

    def say() -> None:
        if texts:
            form.add(path, {"role": "user", "content": list(texts)})
            texts.clear()

    for index, value in enumerate(message.content):
        at = f"{path}.content[{index}]"
        match _kind(value, at):
            case "text":
                texts.append({"type": "text", "text": read(TextBlock, value, at).text})
            case "tool_result":
                say()
                result = read(ToolResultBlock, value, at)
                content = _texts(result.content or "", f"{at}.content")
                if result.is_error:
                    content = _as_error(content)
                answer = {"role": "tool", "tool_call_id": result.tool_use_id, "content": content}
                form.add(at, answer, tool_call_id=f"{at}.tool_use_id", role=at)
            case other:
                raise unsupported(f"{at}.type", other, "text and tool_result are")
    say()


def _as_error(content: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
    """Templates have no other place to say so. Most results say it themselves."""
    first = content if isinstance(content, str) else content[0]["text"]
    if _SAYS_ERROR.search(first):
        return content
    if isinstance(content, str):
        return f"{_ERROR}{content}"
    return [{"type": "text", "text": f"{_ERROR}{first}"}, *content[1:]]


def _read_assistant(message: Message, path: str, form: ChatForm) -> None:
    if isinstance(message.content, str):
        form.add(path, {"role": "assistant", "content": message.content})
        return
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[tuple[str, ToolUseBlock]] = []
    for index, value in enumerate(message.content):
        at = f"{path}.content[{index}]"
        match _kind(value, at):
            case "text":
                texts.append(read(TextBlock, value, at).text)
            case "thinking":
                thoughts.append(read(ThinkingBlock, value, at).thinking)
            case "redacted_thinking":
                # Encrypted by others: nothing can be read of it.
                pass
            case "tool_use":
                calls.append((at, read(ToolUseBlock, value, at)))
            case other:
                supported = "text, thinking, redacted_thinking and tool_use are"
                raise unsupported(f"{at}.type", other, supported)
    said: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if any(thoughts):
        said["reasoning_content"] = "\n".join(filter(None, thoughts))
    form.add(path, said)
    for at, call in calls:
        arguments = json.dumps(call.input, ensure_ascii=False)
        form.add_call(at, call.id, call.name, arguments, called="input")


def _texts(content: str | list[Any], path: str) -> str | list[dict[str, str]]:
    """As chat completions have it. Raises InvalidParam for what is no text."""
    if isinstance(content, str):
        return content
    parts = []
    for index, value in enumerate(content):
        at = f"{path}[{index}]"
        kind = _kind(value, at)
        if kind != "text":
            raise unsupported(f"{at}.type", kind, "'text' is")
        parts.append({"type": "text", "text": read(TextBlock, value, at).text})
    return parts or ""


def _kind(block: Any, path: str) -> str:
    if not isinstance(block, dict):
        raise InvalidParam(path, "must be an object")
    kind = block.get("type")
    if not isinstance(kind, str):
        raise InvalidParam(f"{path}.type", "is missing" if kind is None else "must be text")
    return kind
