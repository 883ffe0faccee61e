"""What a chat template takes. That is found out by rendering samples, as templates say it in many
ways."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

Messages = Sequence[Mapping[str, Any]]


class Render(Protocol):
    """Raises what it likes."""

    def __call__(
        self, messages: Messages, *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str: ...


class Takes(NamedTuple):
    """For the content of a role's messages."""

    text: bool
    parts: bool


class CallForm(NamedTuple):
    """How messages that call tools reach a template."""

    empty_content: str | None
    """In place of what a message does not say beside its calls."""
    are_arguments_text: bool
    """JSON; else what it stands for."""

    def arguments(self, arguments: Any) -> Any:
        if self.are_arguments_text and not isinstance(arguments, str):
            return json.dumps(arguments, ensure_ascii=False)
        return arguments


_SAMPLE = "xq7samplexq7"
_SAMPLE_IN_NOTATION = re.compile(rf"""['"]text['"]\s*:\s*['"]{_SAMPLE}""")
_TOOL, _KEY, _CALL_ID = "xq7tool", "xq7key", "xq7callid"
_KEY_IN_NOTATION = re.compile(rf"""'{_KEY}'|\\["']{_KEY}""")
"""As Python writes a dictionary, and as JSON writes JSON."""
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": _TOOL,
            "description": "a",
            "parameters": {
                "type": "object",
                "properties": {_KEY: {"type": "string", "description": "a"}},
                "required": [_KEY],
            },
        },
    }
]


class TemplateProbe:
    def __init__(self, render: Render) -> None:
        self._render = render
        self._taken: dict[str, Takes] = {}

    def takes(self, role: str) -> Takes:
        if role not in self._taken:
            self._taken[role] = Takes(
                text=any(map(self._shows, self._sample_chats(role, as_parts=False))),
                parts=any(map(self._shows, self._sample_chats(role, as_parts=True))),
            )
        return self._taken[role]

    @cached_property
    def takes_tools(self) -> bool:
        user, system = ({"role": role, "content": "a"} for role in ("user", "system"))
        return any(_TOOL in self._rendered(chat, tools=_TOOLS) for chat in ([user], [system, user]))

    @cached_property
    def call_form(self) -> CallForm | None:
        """None when it shows no calls."""
        # As OpenAI and transformers have them, if that is how it takes them.
        for are_text in (False, True):
            null, empty = (self._calls(CallForm(each, are_text)) for each in (None, ""))
            if null and not (empty and null.count("None") > empty.count("None")):
                return CallForm(None, are_text)
            if empty:
                return CallForm("", are_text)
        return None

    def _shows(self, chat: list[dict[str, Any]]) -> bool:
        """Whether the sample gets into the prompt, as a text and not in the notation of a part."""
        prompt = self._rendered(chat)
        return _SAMPLE in prompt and not _SAMPLE_IN_NOTATION.search(prompt)

    def _calls(self, form: CallForm) -> str:
        """A prompt that shows a call as it should be; empty when none does."""
        user = {"role": "user", "content": "a"}
        chats = ([user, _call(form), _answer("a")], [user, _call(form), _answer("a"), user])
        prompts = (self._rendered(chat, tools) for chat in chats for tools in (None, _TOOLS))
        shown = (
            prompt
            for prompt in prompts
            if _SAMPLE in prompt and _TOOL in prompt and not _KEY_IN_NOTATION.search(prompt)
        )
        return next(shown, "")

    def _rendered(self, chat: Messages, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """Empty when the template refuses it."""
        try:
            return self._render(chat, tools=tools)
        except Exception:  # templates compute what they like
            return ""

    def _sample_chats(self, role: str, *, as_parts: bool) -> Iterator[list[dict[str, Any]]]:
        """Chats of which one message, of `role`, has the sample for its content. Most templates
        take one of them."""

        def content(text: str, *, as_parts: bool) -> Any:
            return [{"type": "text", "text": text}] if as_parts else text

        sample = {"role": role, "content": content(_SAMPLE, as_parts=as_parts)}
        for others_as_parts in (False, True):
            system, user, assistant = (
                {"role": name, "content": content("a", as_parts=others_as_parts)}
                for name in ("system", "user", "assistant")
            )
            if role == "system":
                yield [sample, user]
            elif role == "user":
                yield [sample]
                yield [system, sample]
                yield [user, assistant, sample]
            elif role == "tool":
                call = _call(self.call_form or CallForm(None, are_arguments_text=False), "a")
                yield [user, call, _answer(sample["content"])]
                yield [user, call, _answer(sample["content"]), user]
            else:
                yield [user, sample, user]
                yield [user, sample]
                yield [system, user, sample, user]


def _call(form: CallForm, value: str = _SAMPLE) -> dict[str, Any]:
    function = {"name": _TOOL, "arguments": form.arguments({_KEY: value})}
    calls = [{"id": _CALL_ID, "type": "function", "function": function}]
    return {"role": "assistant", "content": form.empty_content, "tool_calls": calls}


def _answer(content: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": _CALL_ID, "name": _TOOL}
