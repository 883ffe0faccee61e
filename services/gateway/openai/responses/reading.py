"""A request to /v1/responses in the form of chat completions."""

from __future__ import annotations

from typing import Any

from baton.services.gateway.openai.chat_form import (
    ChatForm,
    check_contents,
    check_entries,
    read,
    take_alike,
    unsupported,
)
from baton.services.gateway.openai.errors import InvalidParam
from baton.services.gateway.openai.responses.schema import (
    INCLUDABLE,
    LOGPROBS,
    MAX_KEY,
    MAX_METADATA,
    MAX_VALUE,
    UNSUPPORTED,
    CallItem,
    CallOutputItem,
    ChosenTool,
    ContentPart,
    FunctionTool,
    MessageItem,
    ReasoningItem,
    ResponsesRequest,
)
from baton.services.gateway.openai.schema import check_neutral

_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = ("input_text", "output_text", "text", "refusal")


def responses_request(body: dict[str, Any]) -> ResponsesRequest:
    """Raises InvalidParam, also for what a server without a memory cannot do."""
    check_neutral(body, UNSUPPORTED)
    for name in ("input", "tools", "include", "metadata"):
        check_entries(body.get(name), name)
    fields = read(ResponsesRequest, body)
    if fields.store:
        problem = "is not supported: no response is stored; leave it out, or false"
        raise InvalidParam("store", problem, code="unsupported_parameter")
    for index, name in enumerate(fields.include or ()):
        if name not in INCLUDABLE:
            raise InvalidParam(f"include[{index}]", f"{name[:60]!r} is not supported")
    _check_metadata(fields.metadata or {})
    return fields


def chat_form(fields: ResponsesRequest, body: dict[str, Any]) -> ChatForm:
    """Raises InvalidParam."""
    form = ChatForm(places={"messages": "input"})
    take_alike(body, form)
    form.set("max_completion_tokens", fields.max_output_tokens, "max_output_tokens")
    form.set("parallel_tool_calls", fields.parallel_tool_calls, "parallel_tool_calls")
    _read_logprobs(fields, form)
    if fields.reasoning is not None:
        form.set("reasoning_effort", fields.reasoning.effort, "reasoning.effort")
    if fields.text is not None and fields.text.format is not None:
        _read_format(fields.text.format, form)
    _read_tools(fields, form)
    _read_input(fields, form)
    return form


def _read_logprobs(fields: ResponsesRequest, form: ChatForm) -> None:
    if LOGPROBS in (fields.include or ()):
        form.set("logprobs", True, "include")
        form.set("top_logprobs", fields.top_logprobs or 0, "top_logprobs")
    elif fields.top_logprobs:
        raise InvalidParam("top_logprobs", f"needs {LOGPROBS!r} in include")


def _check_metadata(metadata: dict[str, Any]) -> None:
    if len(metadata) > MAX_METADATA:
        raise InvalidParam("metadata", f"has {len(metadata)} entries; limit: {MAX_METADATA}")
    for key, value in metadata.items():
        if len(key) > MAX_KEY:
            problem = f"has a key of {len(key)} characters; limit: {MAX_KEY}"
            raise InvalidParam("metadata", problem)
        if not isinstance(value, str) or len(value) > MAX_VALUE:
            problem = f"must be text of at most {MAX_VALUE} characters"
            raise InvalidParam(f"metadata.{key}", problem)


def _read_format(given: dict[str, Any], form: ChatForm) -> None:
    if given.get("type") != "json_schema":
        form.set("response_format", given, "text.format")
        return
    # The fields of the schema are on a level of their own there.
    named = {name: value for name, value in given.items() if name != "type"}
    form.set("response_format", {"type": "json_schema", "json_schema": named}, "text.format")
    form.places["response_format.json_schema"] = "text.format"


def _read_tools(fields: ResponsesRequest, form: ChatForm) -> None:
    choice = fields.tool_choice
    allowed: set[str] | None = None
    if isinstance(choice, dict):
        choice, allowed = _choice(read(ChosenTool, choice, "tool_choice"))
    functions: list[dict[str, Any]] = []
    for index, tool in enumerate(fields.tools or ()):
        path = f"tools[{index}]"
        function = _function(tool, path)
        if allowed is None or function["name"] in allowed:
            form.places |= {
                f"tools[{len(functions)}]": path,
                f"tools[{len(functions)}].function": path,
            }
            functions.append({"type": "function", "function": function})
    missing = (allowed or set()) - {tool["function"]["name"] for tool in functions}
    if missing:
        problem = f"names {min(missing)[:60]!r}, which is none of the tools"
        raise InvalidParam("tool_choice.tools", problem)
    if functions:
        form.set("tools", functions, "tools")
    form.set("tool_choice", choice, "tool_choice")
    form.places["tool_choice.function"] = "tool_choice"


def _function(tool: Any, path: str) -> dict[str, Any]:
    """As chat completions have it."""
    if not isinstance(tool, dict):
        raise InvalidParam(path, "must be an object")
    if tool.get("type") != "function":
        raise unsupported(f"{path}.type", tool.get("type"), "'function' is")
    function = read(FunctionTool, tool, path)
    return function.model_dump(exclude={"type"}, exclude_none=True)


def _choice(chosen: ChosenTool) -> tuple[str | dict[str, Any], set[str] | None]:
    """As chat completions have it, and the names of the tools that it leaves."""
    match chosen.type:
        case "function":
            if chosen.name is None:
                raise InvalidParam("tool_choice.name", "is missing")
            return {"type": "function", "function": {"name": chosen.name}}, None
        case "allowed_tools":
            if chosen.mode not in ("auto", "required"):
                raise InvalidParam("tool_choice.mode", "must be 'auto' or 'required'")
            tools = [
                read(ChosenTool, tool, f"tool_choice.tools[{index}]")
                for index, tool in enumerate(chosen.tools or ())
            ]
            return chosen.mode, {tool.name for tool in tools if tool.name is not None}
        case other:
            supported = "'function' and 'allowed_tools' are"
            raise unsupported("tool_choice.type", other, supported)


def _read_input(fields: ResponsesRequest, form: ChatForm) -> None:
    if fields.input is None or fields.input == []:
        raise InvalidParam("input", "is missing" if fields.input is None else "is empty")
    if fields.instructions is not None:
        message = {"role": "system", "content": fields.instructions}
        form.add("instructions", message, content="instructions")
    if isinstance(fields.input, str):
        form.add("input", {"role": "user", "content": fields.input}, content="input")
        return
    check_contents(fields.input, "input")
    items = _Items(form)
    for index, item in enumerate(fields.input):
        items.take(item, f"input[{index}]")


class _Items:
    """Puts items together to messages: reasoning, text and calls that follow each other are one
    message of the assistant, as templates take it."""

    def __init__(self, form: ChatForm) -> None:
        self._form = form
        self._reasoning: str | None = None
        """That of the message to come."""
        self._is_open = False
        """Whether calls would be the last message's."""

    def take(self, item: Any, path: str) -> None:
        if not isinstance(item, dict):
            raise InvalidParam(path, "must be an object")
        kind = item.get("type") or ("message" if "role" in item else None)
        match kind:
            case "message":
                self._take_message(read(MessageItem, item, path), path)
            case "reasoning":
                self._take_reasoning(read(ReasoningItem, item, path), path)
            case "function_call":
                self._take_call(read(CallItem, item, path), path)
            case "function_call_output":
                self._take_output(read(CallOutputItem, item, path), path)
            case "item_reference":
                problem = "'item_reference' is not supported: no item is stored"
                raise InvalidParam(f"{path}.type", problem, code="unsupported_parameter")
            case _:
                supported = "message, reasoning, function_call and function_call_output are"
                raise unsupported(f"{path}.type", kind, supported)

    def _take_message(self, item: MessageItem, path: str) -> None:
        if item.role not in _ROLES:
            problem = f"is not supported; choose from {', '.join(_ROLES)}"
            raise InvalidParam(f"{path}.role", problem)
        content = _content(item.content, f"{path}.content")
        if item.role == "assistant":
            text = content if isinstance(content, str) else "".join(p["text"] for p in content)
            self._add_assistant(text, path)
        else:
            self._reasoning, self._is_open = None, False
            self._form.add(path, {"role": item.role, "content": content})

    def _take_reasoning(self, item: ReasoningItem, path: str) -> None:
        texts = [
            text.get("text")
            for text in (*(item.content or ()), *(() if item.content else item.summary or ()))
            if isinstance(text, dict)
        ]
        self._is_open = False
        # Of what others have encrypted nothing can be read.
        self._reasoning = "\n".join(text for text in texts if isinstance(text, str)) or None

    def _take_call(self, item: CallItem, path: str) -> None:
        if not self._is_open:
            self._add_assistant(None, path)
        self._form.add_call(path, item.call_id, item.name, item.arguments)

    def _take_output(self, item: CallOutputItem, path: str) -> None:
        self._reasoning, self._is_open = None, False
        message = {
            "role": "tool",
            "tool_call_id": item.call_id,
            "content": _content(item.output, f"{path}.output"),
        }
        self._form.add(
            path, message, content=f"{path}.output", tool_call_id=f"{path}.call_id", role=path
        )

    def _add_assistant(self, text: str | None, path: str) -> None:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self._reasoning is not None:
            message["reasoning_content"] = self._reasoning
        self._form.add(path, message)
        self._reasoning, self._is_open = None, True


def _content(content: str | list[Any], path: str) -> str | list[dict[str, str]]:
    """As chat completions have it. Raises InvalidParam for what is no text."""
    if isinstance(content, str):
        return content
    parts = []
    for index, value in enumerate(content):
        at = f"{path}[{index}]"
        part = read(ContentPart, value, at)
        if part.type not in _TEXTS:
            raise unsupported(f"{at}.type", part.type, "text is")
        text = part.refusal if part.type == "refusal" else part.text
        if text is None:
            name = "refusal" if part.type == "refusal" else "text"
            raise InvalidParam(f"{at}.{name}", "is missing")
        parts.append({"type": "text", "text": text})
    return parts
