"""The chat template of a model directory, rendered as transformers renders it."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.shared.model_files.fields import ModelError
from baton.shared.rpc.errors import InvalidField, NoChatTemplate
from baton.shared.telemetry import log_event
from baton.shared.tokenizer.files import one_line, read_json_object

logger = logging.getLogger(__name__)

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""What a message's reasoning is called; the first is what templates read."""


class ChatTemplate:
    """Jinja that came with the weights, so it runs in a sandbox."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: by the name that templates use; what the model lacks is undefined."""
        self.source = source
        self._special_tokens = special_tokens
        self._taken: dict[str, _Takes] = {}
        self._compiled: jinja2.Template | None = None
        self.fault = ""
        """Why it does not compile. Prompts can be served all the same."""
        try:
            self._compiled = _environment().from_string(source)
        except Exception as error:  # what is no Jinja may fail in Jinja's lexer or in Python's
            line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
            self.fault = line + one_line(error)

    @classmethod
    def load(cls, model_dir: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
        """None without a template; ModelError, naming the file, when one cannot be read. Says in
        the log when it does not compile."""
        path, source = _find(model_dir)
        if source is None:
            return None
        template = cls(source, special_tokens)
        if template.fault:
            log_event(
                logger,
                logging.ERROR,
                "the chat template does not compile: chats are refused",
                file=str(path),
                message=template.fault,
            )
        return template

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """`content` is text or a list of parts, and reaches the template as it is, unless the
        template takes only the other one.

        Raises NoChatTemplate when it does not compile, InvalidField when it refuses the messages.
        """
        taken = [self._as_taken(message) for message in messages]
        try:
            return self._render(taken, add_generation_prompt=add_generation_prompt)
        except NoChatTemplate:
            raise
        except Exception as error:  # templates compute what they like
            limit = "what the model's chat template takes"
            problem = f"cannot be rendered: {one_line(error)}"
            raise InvalidField("messages", problem, limit=limit) from error

    def _render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        if self._compiled is None:
            raise NoChatTemplate(f"the model's chat template does not compile: {self.fault}")
        return self._compiled.render(
            self._special_tokens,
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
        )

    def _as_taken(self, message: Mapping[str, Any]) -> dict[str, Any]:
        present = {key: value for key, value in message.items() if value is not None}
        reasoning = next((present[key] for key in _REASONING if key in present), None)
        if reasoning is not None:
            present = {"thinking": reasoning, **present, "reasoning_content": reasoning}
        content = present.get("content")
        takes = self._takes(str(present.get("role")))
        if isinstance(content, str) and not takes.text and takes.parts:
            present["content"] = [{"type": "text", "text": content}]
        elif isinstance(content, list) and not takes.parts and _is_text_only(content):
            present["content"] = "\n".join(part["text"] for part in content)
        return present

    def _takes(self, role: str) -> _Takes:
        if role not in self._taken:
            chats = functools.partial(_sample_chats, role)
            self._taken[role] = _Takes(
                text=any(map(self._shows, chats(as_parts=False))),
                parts=any(map(self._shows, chats(as_parts=True))),
            )
        return self._taken[role]

    def _shows(self, chat: list[dict[str, Any]]) -> bool:
        """Whether the sample gets into the prompt, as a text and not in the notation of a part."""
        try:
            prompt = self._render(chat, add_generation_prompt=True)
        except Exception:  # templates compute what they like
            return False
        return _SAMPLE in prompt and not _SAMPLE_IN_NOTATION.search(prompt)


@functools.lru_cache(maxsize=8)
def template_variables(source: str) -> frozenset[str]:
    """What a template reads and does not set by itself; nothing of one that does not compile."""
    try:
        return frozenset(meta.find_undeclared_variables(_environment().parse(source)))
    except Exception:  # what is no Jinja may fail in Jinja's lexer or in Python's
        return frozenset()


class _Takes(NamedTuple):
    """What a template takes for the content of a role's messages. That is found out by rendering,
    as templates say it in many ways."""

    text: bool
    parts: bool


_SAMPLE = "xq7samplexq7"
_SAMPLE_IN_NOTATION = re.compile(rf"""['"]text['"]\s*:\s*['"]{_SAMPLE}""")


def _sample_chats(role: str, *, as_parts: bool) -> Iterator[list[dict[str, Any]]]:
    """Chats of which one message, of `role`, has the sample for its content. Most templates take
    one of them."""

    def message(role: str, text: str, *, as_parts: bool) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}

    sample = message(role, _SAMPLE, as_parts=as_parts)
    for others_as_parts in (False, True):
        system, user, assistant = (
            message(name, "a", as_parts=others_as_parts) for name in ("system", "user", "assistant")
        )
        if role == "system":
            yield [sample, user]
        elif role == "user":
            yield [sample]
            yield [system, sample]
            yield [user, assistant, sample]
        else:
            yield [user, sample, user]
            yield [user, sample]
            yield [system, user, sample, user]


def _is_text_only(content: Sequence[Any]) -> bool:
    return all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content)


def _find(model_dir: Path) -> tuple[Path, str | None]:
    """The default template and where it stands. Raises ModelError, naming the file."""
    templates = _in_files(model_dir)
    path = model_dir / "tokenizer_config.json"
    if not templates:
        try:
            templates = {name: (path, source) for name, source in _in_config(path).items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise ModelError(f"{path}: chat_template cannot be read: {error!r}") from error
    for name, (path, source) in templates.items():
        if not isinstance(source, str):
            raise ModelError(f"{path}: chat_template {name!r} is no text")
    if templates and "default" not in templates:
        names = ", ".join(sorted(templates))
        message = "of several chat templates none is the default: chats are refused"
        log_event(logger, logging.ERROR, message, file=str(path), names=names)
    return templates.get("default", (path, None))


def _in_files(model_dir: Path) -> dict[str, tuple[Path, str]]:
    """By name. Where there is one, tokenizer_config.json does not count."""
    paths = {"default": model_dir / "chat_template.jinja"}
    more = sorted((model_dir / "additional_chat_templates").glob("*.jinja"))
    paths |= {path.stem: path for path in more}
    templates = {}
    for name, path in paths.items():
        try:
            if path.exists():
                templates[name] = (path, path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: {one_line(error)}") from error
    return templates


def _in_config(path: Path) -> dict[str, Any]:
    """By name."""
    value = read_json_object(path).get("chat_template")
    if isinstance(value, list):
        return {entry["name"]: entry["template"] for entry in value}
    if isinstance(value, dict):
        return value
    return {} if value is None else {"default": value}


def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives to templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationTag],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(Extension):
    """`{% generation %}` … `{% endgeneration %}` mark what a model is trained on, nothing else."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # What is set within stays within, as in transformers.
        return nodes.Scope(body, lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    """In the host's time zone, which it does not name."""
    return datetime.now().strftime(format)


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)
