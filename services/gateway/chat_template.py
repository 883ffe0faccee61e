"""The chat template of a model directory."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.shared.engine.config import ModelError
from baton.shared.rpc.errors import InvalidField


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja that came with the weights, so it runs in a sandbox."""

    source: str
    special_tokens: Mapping[str, str]
    """Those that templates name: `bos_token`, `eos_token`; empty where the model has none."""

    @classmethod
    def load(cls, model_dir: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
        """None without a template; ModelError, naming the file, when one cannot be read."""
        path = model_dir / "tokenizer_config.json"
        try:
            config = json.loads(path.read_text("utf-8")) if path.exists() else {}
            source = config.get("chat_template")
            if isinstance(source, list):
                source = {entry["name"]: entry["template"] for entry in source}.get("default")
            if (model_dir / "chat_template.jinja").exists():
                path = model_dir / "chat_template.jinja"
                source = path.read_text("utf-8")
            if not isinstance(source, str | None):
                raise ValueError("chat_template is not text")
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise ModelError(f"{path}: {error}") from error
        return None if source is None else cls(source, special_tokens)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """Raises InvalidField when the template refuses the messages, or is itself broken."""
        try:
            return self._compiled.render(
                self.special_tokens, messages=messages, add_generation_prompt=add_generation_prompt
            )
        except (jinja2.TemplateError, LookupError, TypeError, ValueError) as error:
            limit = "what the model's chat template takes"
            raise InvalidField("messages", f"cannot be rendered: {error}", limit=limit) from error

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        # A broken template must not keep the model from serving prompts, so not when loading.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
        )
        # Templates are written for what transformers gives them.
        environment.globals["raise_exception"] = _raise_template_error
        environment.globals["strftime_now"] = _strftime_now
        return environment.from_string(self.source)


class _GenerationTag(Extension):
    """`{% generation %}` … `{% endgeneration %}` mark what a model is trained on, nothing else."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # What is set within stays within, as in transformers.
        return nodes.Scope(body, lineno=line)


def _strftime_now(format: str) -> str:
    """In the host's time zone."""
    return datetime.now().astimezone().strftime(format)


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)
