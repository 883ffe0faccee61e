"""Tools of a request: what may be called, and what was."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from baton.services.gateway.openai.errors import InvalidParam
from baton.services.gateway.openai.fields import Fields
from baton.services.gateway.openai.nesting import Nesting
from baton.services.gateway.strict_json import strict_json

MAX_TOOLS = 512
_MAX_VALUES = 20_000
_MAX_CHARACTERS = 1 << 19
"""Of all tools together."""
_MAX_ARGUMENTS = 1 << 16
"""Values in the arguments of all calls of a chat together."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_NAME_LIMIT = "must be 1 to 128 letters, digits, '_', '-' and '.'"
_CHOICES = ("none", "auto", "required")


class Function(Fields):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    type: str
    function: Function | None = None


class CalledFunction(Fields):
    name: str
    arguments: str | dict[str, Any] | None = None


class MadeCall(Fields):
    """By an earlier answer."""

    id: str | None = None
    type: str | None = None
    function: CalledFunction


@dataclass(frozen=True)
class OfferedTools:
    """What the model may call."""

    functions: Sequence[Function] = ()
    choice: str = "auto"
    """`auto`, or `required`: it must call."""
    named: str | None = None
    """The one that it must call."""
    is_parallel: bool = True
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By name."""

    @property
    def must_call(self) -> bool:
        return self.choice == "required"

    @property
    def is_constrained(self) -> bool:
        """Whether calls must be valid, or must come at all."""
        return self.must_call or self.is_strict

    @property
    def is_strict(self) -> bool:
        """Whether calls that need not come must be valid."""
        return not self.must_call and any(function.strict for function in self.functions)

    @property
    def constrained(self) -> Mapping[str, Mapping[str, Any]]:
        """The schemas by which calls must be valid: of a tool that is not strict, any object."""
        if self.must_call:
            return {self.named: self.schemas[self.named]} if self.named else self.schemas
        return {
            function.name: self.schemas[function.name] if function.strict else {"type": "object"}
            for function in self.functions
        }

    def for_template(self) -> list[dict[str, Any]]:
        return [
            {
                "type": "function",
                "function": {
                    "name": function.name,
                    **({"description": function.description} if function.description else {}),
                    # Templates walk through them.
                    "parameters": parameters_of(function),
                },
            }
            for function in self.functions
        ]


def check_tools(tools: Sequence[Any]) -> None:
    """Before anything walks them. Raises InvalidParam."""
    if len(tools) > MAX_TOOLS:
        raise InvalidParam("tools", f"has {len(tools)} entries; limit: {MAX_TOOLS}")
    nesting = Nesting(max_values=_MAX_VALUES, max_characters=_MAX_CHARACTERS)
    for index, tool in enumerate(tools):
        nesting.add(f"tools[{index}]", tool)


def arguments_nesting() -> Nesting:
    """Of the calls of one chat."""
    return Nesting(max_values=_MAX_ARGUMENTS)


def offered_tools(tools: Sequence[Tool] | None, choice: Any, *, is_parallel: bool) -> OfferedTools:
    """None where the model is not to call any. Raises InvalidParam."""
    functions = [_function(tool, f"tools[{index}]") for index, tool in enumerate(tools or ())]
    schemas: dict[str, Mapping[str, Any]] = {}
    for index, function in enumerate(functions):
        if function.name in schemas:
            problem = f"is {function.name!r}, which another tool has"
            raise InvalidParam(f"tools[{index}].function.name", problem)
        schemas[function.name] = parameters_of(function)
    mode, named = _choice(choice)
    if mode == "required" and not functions:
        raise InvalidParam("tool_choice", "needs tools")
    if named is not None and named not in schemas:
        problem = f"is {named[:60]!r}, which is none of the tools"
        raise InvalidParam("tool_choice.function.name", problem)
    if mode == "none" or not functions:
        return OfferedTools()
    # Who names a function asks for one call of it.
    return OfferedTools(functions, mode, named, is_parallel and named is None, schemas)


def parameters_of(function: Function) -> dict[str, Any]:
    """As a JSON schema."""
    return function.parameters or {"type": "object", "properties": {}}


def _function(tool: Tool, path: str) -> Function:
    if tool.type != "function":
        problem = f"{tool.type[:40]!r} is not supported; only 'function' is"
        raise InvalidParam(f"{path}.type", problem, code="unsupported_parameter")
    if tool.function is None:
        raise InvalidParam(f"{path}.function", "is missing")
    if not _NAME.fullmatch(tool.function.name):
        raise InvalidParam(f"{path}.function.name", _NAME_LIMIT)
    parameters = tool.function.parameters
    if parameters and parameters.get("type", "object") != "object":
        problem = f"is {str(parameters['type'])[:40]!r}; parameters are an 'object'"
        raise InvalidParam(f"{path}.function.parameters.type", problem)
    return tool.function


def _choice(choice: Any) -> tuple[str, str | None]:
    """The mode, and the name of the tool that must be called."""
    if choice is None:
        return "auto", None
    if isinstance(choice, str):
        if choice not in _CHOICES:
            problem = f"is {choice[:40]!r}; choose from {', '.join(_CHOICES)}, or name a function"
            raise InvalidParam("tool_choice", problem)
        return choice, None
    if not isinstance(choice, Mapping):
        raise InvalidParam("tool_choice", "must be text or an object")
    if choice.get("type") != "function":
        problem = f"{str(choice.get('type'))[:40]!r} is not supported; only 'function' is"
        raise InvalidParam("tool_choice.type", problem, code="unsupported_parameter")
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise InvalidParam("tool_choice.function.name", "is missing")
    return "required", name


def template_calls(calls: Sequence[MadeCall], path: str, nesting: Nesting) -> list[dict[str, Any]]:
    """Calls of an earlier answer as templates take them: arguments are an object, or what the
    model wrote when that is none. `nesting`: that of the whole chat's. Raises InvalidParam."""
    rendered = []
    for index, call in enumerate(calls):
        if call.type not in (None, "function"):
            problem = f"{call.type[:40]!r} is not supported; only 'function' is"
            raise InvalidParam(f"{path}[{index}].type", problem, code="unsupported_parameter")
        arguments = _arguments(call.function.arguments)
        nesting.add(f"{path}[{index}].function.arguments", arguments)
        function = {"name": call.function.name, "arguments": arguments}
        entry: dict[str, Any] = {"type": "function", "function": function}
        rendered.append(entry if call.id is None else {"id": call.id, **entry})
    return rendered


def _arguments(arguments: str | dict[str, Any] | None) -> str | dict[str, Any]:
    if isinstance(arguments, dict):
        return arguments
    if not arguments or not arguments.strip():
        return {}
    try:
        parsed = strict_json(arguments)
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments
