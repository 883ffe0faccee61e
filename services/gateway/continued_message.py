"""A chat whose last message is not over: what is drawn goes on with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from baton.shared.rpc.errors import InvalidField

_MARK = "xq7goesonxq7 "
"""Shows where a template has put the end of the message, and by its last character whether it trims
texts. Templates look at what a message says, so it looks like a word."""


def marked(message: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The message with a mark behind its text, and that text. Raises InvalidField when it has
    none."""
    content = message.get("content")
    if isinstance(content, str) and content:
        return {**message, "content": content + _MARK}, content
    parts = content if isinstance(content, list) else []
    for index in reversed(range(len(parts))):
        text = parts[index].get("text")
        if isinstance(text, str) and text:
            part = {**parts[index], "text": text + _MARK}
            return {**message, "content": [*parts[:index], part, *parts[index + 1 :]]}, text
    raise InvalidField("messages", "end with one that has no text", limit="a text to go on with")


def up_to_mark(prompt: str, text: str) -> str:
    """The prompt that ends where `text` does, of one with the mark behind it.

    Raises InvalidField when it is not there as it is.
    """
    end = prompt.rfind(_MARK.rstrip())
    # Some templates write a message, or a part of it, more than once.
    before = prompt[: max(end, 0)].replace(_MARK, "").replace(_MARK.rstrip(), "")
    if end < 0 or text.strip() not in before or _MARK.rstrip() in before.lower():
        problem = "end with one that the model's chat template does not write as it is"
        raise InvalidField("messages", problem, limit="a text to go on with")
    return before if prompt.startswith(_MARK, end) else before.rstrip()
