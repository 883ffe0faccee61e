"""What an answer must look like so that it is a call, or so that its calls are valid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, NamedTuple

from baton.services.gateway.formats import deepseek, granite, harmony, hermes, kimi, mistral
from baton.shared.answer_formats import HARMONY
from baton.shared.constraints.schema import written as written_schemas
from baton.v1 import types_pb2


class Written(NamedTuple):
    """How a call is written around its arguments, which are JSON."""

    begin: str
    """With the tool's name for `{}`."""
    end: str
    trigger: str
    """With which each call begins, and nothing else does."""


_HERMES = Written(
    f'{hermes.BEGIN}\n{{{{"name": "{{}}", "arguments": ', f"}}\n{hermes.END}", hermes.BEGIN
)
_LLAMA3 = Written('{{"name": "{}", "parameters": ', "}", '{"name": "')
_MISTRAL = Written(f"{mistral.BEGIN}{{}}{mistral.ARGUMENTS}", "", mistral.BEGIN)
_OLDER_MISTRAL = Written(f'{mistral.BEGIN} [{{{{"name": "{{}}", "arguments": ', "}]", mistral.BEGIN)
_DEEPSEEK = Written(
    f"{deepseek.ALL_BEGIN}{deepseek.BEGIN}{{}}{deepseek.SEPARATOR}",
    f"{deepseek.END}{deepseek.ALL_END}",
    deepseek.ALL_BEGIN,
)
_FENCED_DEEPSEEK = Written(
    f"{deepseek.ALL_BEGIN}{deepseek.BEGIN}function{deepseek.SEPARATOR}{{}}\n```json\n",
    f"\n```{deepseek.END}{deepseek.ALL_END}",
    deepseek.ALL_BEGIN,
)
_KIMI = Written(
    f"{kimi.ALL_BEGIN}{kimi.BEGIN}functions.{{}}:0{kimi.SEPARATOR}",
    f"{kimi.END}{kimi.ALL_END}",
    kimi.ALL_BEGIN,
)
_GRANITE = Written(f'{granite.BEGIN}[{{{{"name": "{{}}", "arguments": ', "}]", granite.BEGIN)
_HARMONY = Written(
    f"{harmony.START}assistant{harmony.CHANNEL}commentary to=functions.{{}} "
    f"{harmony.CONSTRAIN}json{harmony.MESSAGE}",
    harmony.CALL,
    harmony.START,
)

ANSWER_BEGIN = f"{harmony.START}assistant{harmony.CHANNEL}final{harmony.MESSAGE}"
"""Of harmony, behind a message that is reasoning."""

_WRITTEN: dict[str, Callable[[str], Written]] = {
    "hermes": lambda template: _HERMES,
    "glm": lambda template: _HERMES,
    "qwen3-coder": lambda template: _HERMES,
    "llama3": lambda template: _LLAMA3,
    "pythonic": lambda template: _LLAMA3,
    "mistral": lambda template: _MISTRAL if mistral.ARGUMENTS in template else _OLDER_MISTRAL,
    "deepseek": lambda template: _FENCED_DEEPSEEK if "```json" in template else _DEEPSEEK,
    "kimi": lambda template: _KIMI,
    "granite": lambda template: _GRANITE,
    HARMONY: lambda template: _HARMONY,
}

READ_AS = {"glm": "hermes", "qwen3-coder": "hermes", "pythonic": "llama3"}
"""Formats without JSON → the one in which they write under a constraint."""

WITHOUT_STRICT = ("pythonic",)
"""Formats in which calls that need not come begin like any text, and have another form than under
a constraint."""


def calls_constraint(
    form: str,
    template: str,
    schemas: Mapping[str, Mapping[str, Any]],
    *,
    only_calls: bool,
    is_parallel: bool,
) -> types_pb2.Constraint:
    """`form`: the format's name. `schemas`: of those tools that may be called, in order; the tags
    of the constraint are in the same. `only_calls`: the answer is calls and nothing else; otherwise
    calls are valid where there are any. Raises InvalidField for schemas that are too large."""
    written = _WRITTEN[form](template)
    fields = (f"constraint.structural_tags.tags[{index}].json_schema" for index in count())
    texts = written_schemas(zip(fields, schemas.values(), strict=False))
    tags = types_pb2.StructuralTags(
        triggers=[] if only_calls else [written.trigger],
        only_tags=only_calls,
        at_most_one=not is_parallel or form == HARMONY,
        tags=[
            types_pb2.StructuralTag(
                begin=written.begin.format(name), json_schema=text, end=written.end
            )
            for name, text in zip(schemas, texts, strict=True)
        ],
    )
    return types_pb2.Constraint(structural_tags=tags)
