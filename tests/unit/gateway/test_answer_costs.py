"""An answer of n tokens is read and told in work that grows as n does, whatever is held back."""

from __future__ import annotations

from typing import Any, SupportsIndex

import pytest

from baton.services.gateway.answer_parts import Arguments, Content, Part, Reasoning, ToolCall
from baton.services.gateway.chat_format import ChatFormat
from baton.services.gateway.formats.source import merged
from baton.services.gateway.openai.wire import Choice

NUM_TOKENS = 2000


class Counted(str):
    """A text that counts the characters copied and the lengths asked for, of itself and of what is
    made of it."""

    work = 0

    def _did(self, amount: int) -> None:
        Counted.work += amount

    def __len__(self) -> int:
        self._did(1)
        return super().__len__()

    def __add__(self, other: str) -> Counted:
        return Counted(super().__add__(other))._copied()

    def __radd__(self, other: str) -> Counted:
        return Counted(str.__add__(other, self))._copied()

    def __getitem__(self, place: SupportsIndex | slice) -> Counted:
        return Counted(super().__getitem__(place))._copied()

    def rstrip(self, characters: str | None = None, /) -> Counted:
        self._did(super().__len__())
        return Counted(super().rstrip(characters))

    def _copied(self) -> Counted:
        self._did(super().__len__())
        return self


@pytest.fixture(autouse=True)
def from_zero() -> None:
    Counted.work = 0


TOOLS: dict[str, dict[str, Any]] = {"time": {}}


def read(form: str, reasoning: str, pieces: list[str]) -> list[Part]:
    parser = ChatFormat(form, reasoning).reading("", TOOLS).new_parser("answer")
    parts = [part for piece in pieces for part in parser.feed([], Counted(piece))]
    return merged([*parts, *parser.finish("")])


def test_held_white_space() -> None:
    spaces = [" "] * NUM_TOKENS
    assert read("hermes", "none", ["a", *spaces, "b"]) == [Content("a" + " " * NUM_TOKENS + "b")]
    assert read("hermes", "none", ["a", *spaces]) == [Content("a" + " " * NUM_TOKENS)]
    thought = read("none", "think", ["<think>", "a", *spaces, "b", *spaces, "</think>"])
    assert thought == [Reasoning("a" + " " * NUM_TOKENS + "b")]
    assert Counted.work < 100 * NUM_TOKENS


def test_a_call_in_python() -> None:
    [_, arguments] = read("pythonic", "none", ["[time(a='", *["b"] * NUM_TOKENS, "')]"])
    assert arguments == Arguments(0, f'{{"a": "{"b" * NUM_TOKENS}"}}')
    assert Counted.work < 100 * NUM_TOKENS


def test_what_is_held_as_json() -> None:
    pieces = ['<tool_call>{"arguments": {"a": [', *["1,"] * NUM_TOKENS, '1]}, "name": "time"}']
    [_, arguments] = read("hermes", "none", pieces)
    assert arguments == Arguments(0, '{"a": [' + "1," * NUM_TOKENS + "1]}")
    assert Counted.work < 100 * NUM_TOKENS


def test_parts_put_together() -> None:
    texts = [Counted("a")] * NUM_TOKENS
    choice = Choice(parts=[ToolCall(0, "id", "time"), *(Arguments(0, text) for text in texts)])
    [call] = choice.calls
    assert call.arguments == "a" * NUM_TOKENS
    assert merged([Content(text) for text in texts]) == [Content("a" * NUM_TOKENS)]
    assert Counted.work < 100 * NUM_TOKENS
