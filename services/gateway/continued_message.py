"""A chat whose last message is not over: what is drawn goes on with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from baton.shared.rpc.errors import InvalidField


def continued(message: Mapping[str, Any], render: Callable[[Mapping[str, Any]], str]) -> str:
    """The prompt that ends where the message's text does. `render`: the chat's prompt, with a
    message in the place of its last one.

    Raises InvalidField when there is no text, or it is not in the prompt as it is.
    """
    text = _text_of(message)
    mark = _mark_for(render(message))
    return _up_to(mark, render(_marked(message, mark)), text)


def _text_of(message: Mapping[str, Any]) -> str:
    """Of several parts the last that has some."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts]
    text = next((text for text in reversed(texts) if isinstance(text, str) and text), None)
    if text is None:
        raise InvalidField(
            "messages", "end with one that has no text", limit="a text to go on with"
        )
    return text


def _mark_for(prompt: str) -> str:
    """Shows where a template has put the end of the message, and by its last character whether it
    trims texts. Templates look at what a message says, so it looks like a word, one that the prompt
    has not by itself."""
    known = prompt.lower()
    return next(f"{word} " for n in count(7) if (word := f"xq{n}goesonxq{n}") not in known)


def _marked(message: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """With the mark behind its text."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + mark}
    index = max(index for index, part in enumerate(content) if part.get("text"))
    part = {**content[index], "text": content[index]["text"] + mark}
    return {**message, "content": [*content[:index], part, *content[index + 1 :]]}


def _up_to(mark: str, prompt: str, text: str) -> str:
    """The prompt that ends where `text` does, of one with the mark behind it."""
    word = mark.rstrip()
    end = prompt.rfind(word)
    # Some templates write a message, or a part of it, more than once.
    before = prompt[: max(end, 0)].replace(mark, "").replace(word, "")
    if end < 0 or text.strip() not in before or word in before.lower():
        problem = "end with one that the model's chat template does not write as it is"
        raise InvalidField("messages", problem, limit="a text to go on with")
    return before if prompt.startswith(mark, end) else before.rstrip()
