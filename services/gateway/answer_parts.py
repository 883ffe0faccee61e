"""What an answer consists of, as it comes: the seam between tokens and what HTTP clients get.

    tokens, their text ──► AnswerParser ──► parts ──► Wire (openai/wire.py) ──► events, or one body

A model writes its reasoning and its calls of tools as text, each family in a format of its own.
A parser takes that apart; no wire knows a format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """More of what it says."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool begins. Its arguments follow; those of other calls never come between."""

    index: int
    """Among the calls of this answer, from 0."""
    id: str
    """Nine letters and digits: what the strictest of the templates takes back."""
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of call `index`, which are a JSON object once they are whole."""

    index: int
    text: str


Part = Reasoning | Content | ToolCall | Arguments


class AnswerParser(Protocol):
    """Of one answer, over all its attempts. However the stream is cut into pieces, the parts put
    together are the same. Nothing that the model writes raises anything, and nothing of it is lost:
    what cannot be understood is content."""

    @property
    def num_reasoning_tokens(self) -> int:
        """Of the tokens so far."""

    def feed(self, token_ids: Sequence[int], text: str) -> list[Part]:
        """Both new; text may lag behind tokens."""

    def finish(self, text: str) -> list[Part]:
        """The last text, and what was held back."""


class PlainParser:
    """All is content."""

    num_reasoning_tokens = 0

    def feed(self, token_ids: Sequence[int], text: str) -> list[Part]:
        return [Content(text)] if text else []

    def finish(self, text: str) -> list[Part]:
        return [Content(text)] if text else []


@dataclass(frozen=True, slots=True)
class Reading:
    """How the answers to a request are to be read."""

    new_parser: Callable[[str], AnswerParser] = lambda answer_id: PlainParser()
    """Of the answer's id, which no other answer has."""
    shown_token_ids: frozenset[int] = frozenset()
    """Special tokens that the text it is fed has to have."""


PLAIN = Reading()
