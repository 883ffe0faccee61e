"""The calls of one answer: which tools there are, and the parts that a call consists of."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping
from typing import Any

from baton.services.gateway.answer_parts import Arguments, ToolCall

_DIGITS = string.ascii_letters + string.digits
ID_LENGTH = 9
"""What the templates of mistral ask for; nobody minds."""

Tools = Mapping[str, Mapping[str, Any]]
"""Name → JSON schema of the parameters; empty for a tool that says nothing of them."""


class Calls:
    def __init__(self, tools: Tools, answer_id: str) -> None:
        self.tools = tools
        self._answer_id = answer_id
        self._num_begun = 0

    def begin(self, name: str) -> ToolCall:
        index = self._num_begun
        self._num_begun += 1
        return ToolCall(index, call_id(self._answer_id, index), name)

    def arguments(self, text: str) -> Arguments:
        """Of the call that has begun last."""
        return Arguments(self._num_begun - 1, text)


def call_id(answer_id: str, index: int) -> str:
    """The same for the same call, whatever became of earlier attempts at the answer."""
    return short_id(f"{answer_id}/{index}")


def short_id(text: str) -> str:
    """Nine letters and digits that stand for `text`."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest())
    digits = []
    for _ in range(ID_LENGTH):
        number, digit = divmod(number, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return "".join(digits)
