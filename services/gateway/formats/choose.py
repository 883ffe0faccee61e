"""The formats by name, and which one a model writes: its chat template has the markers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from baton.services.gateway.formats import (
    deepseek,
    glm,
    granite,
    harmony,
    hermes,
    kimi,
    llama3,
    mistral,
    pythonic,
    qwen3_coder,
)
from baton.services.gateway.formats.calls import Calls
from baton.services.gateway.formats.source import Source, Steps
from baton.services.gateway.formats.think import Tags
from baton.shared.answer_formats import HARMONY, NONE


@dataclass(frozen=True)
class ToolFormat:
    steps: Callable[[Source, Calls], Steps[None]]
    markers: tuple[str, ...]
    """What may be special tokens of the vocabulary."""
    signs: re.Pattern[str]
    """In the template of a model that writes it."""


def _signs(*texts: str) -> re.Pattern[str]:
    """All of them, in any order."""
    return re.compile("".join(f"(?=.*{re.escape(text)})" for text in texts), re.DOTALL)


TOOL_FORMATS = {
    # The first whose signs the template has is the model's.
    HARMONY: ToolFormat(harmony.steps, harmony.MARKERS, _signs(harmony.CHANNEL, harmony.MESSAGE)),
    "deepseek": ToolFormat(
        deepseek.steps,
        (
            *(deepseek.ALL_BEGIN, deepseek.ALL_END),
            *(deepseek.BEGIN, deepseek.SEPARATOR, deepseek.END),
        ),
        _signs(deepseek.BEGIN),
    ),
    "kimi": ToolFormat(
        kimi.steps,
        (kimi.ALL_BEGIN, kimi.ALL_END, kimi.BEGIN, kimi.SEPARATOR, kimi.END),
        _signs(kimi.ALL_BEGIN),
    ),
    "mistral": ToolFormat(
        mistral.steps,
        (mistral.BEGIN, mistral.CALL_ID, mistral.ARGUMENTS),
        _signs(mistral.BEGIN),
    ),
    "glm": ToolFormat(
        glm.steps,
        (glm.BEGIN, glm.END, glm.KEY, glm.KEY_END, glm.VALUE, glm.VALUE_END),
        _signs(glm.KEY),
    ),
    "qwen3-coder": ToolFormat(
        qwen3_coder.steps,
        (qwen3_coder.BEGIN, qwen3_coder.END),
        _signs(qwen3_coder.FUNCTION, qwen3_coder.KEY),
    ),
    "granite": ToolFormat(
        granite.steps, (granite.BEGIN, granite.TEXT_BEGIN), _signs(granite.BEGIN)
    ),
    "hermes": ToolFormat(hermes.steps, (hermes.BEGIN, hermes.END), _signs(hermes.BEGIN)),
    "llama3": ToolFormat(
        llama3.steps,
        (llama3.TAG, llama3.BEGIN, llama3.END),
        re.compile(r'<\|python_tag\|>|\\?"name\\?": function name, \\?"parameters\\?"'),
    ),
    "pythonic": ToolFormat(
        pythonic.steps,
        (pythonic.BEGIN, pythonic.END),
        re.compile(r"<\|python_start\|>|\[func_name1\("),
    ),
}

REASONING_TAGS = {
    "mistral": Tags("[THINK]", "[/THINK]"),
    "think": Tags("<think>", "</think>"),
}


def tool_format_of(template: str) -> str:
    """NONE when the template has the signs of none."""
    found = (name for name, form in TOOL_FORMATS.items() if form.signs.search(template))
    return next(found, NONE)


def reasoning_format_of(template: str) -> str:
    """NONE when the template has the signs of none."""
    if TOOL_FORMATS[HARMONY].signs.search(template):
        return HARMONY
    found = (name for name, tags in REASONING_TAGS.items() if tags.end in template)
    return next(found, NONE)
