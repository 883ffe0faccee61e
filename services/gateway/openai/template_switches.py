"""What a request tells the chat template beside messages and tools."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from baton.services.gateway.chat_template import RESERVED_NAMES, template_variables
from baton.services.gateway.openai.errors import InvalidParam

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_EFFORT = "reasoning_effort"
_THINKING_SWITCHES = ("enable_thinking", "thinking")
"""What templates call them that know of no effort."""
_MAX_SWITCHES = 32
_MAX_TEXT = 256
_MAX_NUMBER = 2**53
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_KWARGS = "chat_template_kwargs"


def switches(kwargs: Mapping[str, Any] | None, effort: str | None, template: str) -> dict[str, Any]:
    """Variables of the template. Raises InvalidParam."""
    _check(kwargs or {})
    given = {name: value for name, value in (kwargs or {}).items() if value is not None}
    return {**_of_effort(effort, template_variables(template)), **given}


def _of_effort(effort: str | None, variables: frozenset[str]) -> dict[str, Any]:
    if effort is None:
        return {}
    if effort not in _EFFORTS:
        raise InvalidParam(_EFFORT, f"is not supported; choose from {', '.join(_EFFORTS)}")
    told: dict[str, Any] = {_EFFORT: effort} if _EFFORT in variables else {}
    if effort == "none" or not told:
        told |= {name: effort != "none" for name in _THINKING_SWITCHES if name in variables}
    return told


def _check(kwargs: Mapping[str, Any]) -> None:
    if len(kwargs) > _MAX_SWITCHES:
        raise InvalidParam(_KWARGS, f"has {len(kwargs)} entries; limit: {_MAX_SWITCHES}")
    for name, value in kwargs.items():
        path = f"{_KWARGS}.{name[:64]}"
        if not _NAME.fullmatch(name):
            raise InvalidParam(path, "is no name of a template's variable")
        if name in RESERVED_NAMES or name.endswith(("_token", "_tokens")):
            raise InvalidParam(path, "is not for requests to set")
        is_number = isinstance(value, int | float) and abs(value) <= _MAX_NUMBER
        is_text = isinstance(value, str) and len(value) <= _MAX_TEXT
        if not (value is None or is_number or is_text):
            problem = f"must be true, false, a number or a text of at most {_MAX_TEXT} characters"
            raise InvalidParam(path, problem)
