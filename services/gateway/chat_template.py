"""The chat template of a model directory, rendered as transformers renders it."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.services.gateway.continued_message import continued
from baton.services.gateway.formats import kimi
from baton.services.gateway.formats.calls import ID_LENGTH, short_id
from baton.services.gateway.template_probe import CallForm, TemplateProbe
from baton.shared.model_files.fields import ModelError
from baton.shared.rpc.errors import InvalidField, NoChatTemplate
from baton.shared.telemetry import log_event
from baton.shared.tokenizer.files import one_line, read_json_object

logger = logging.getLogger(__name__)

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""What a message's reasoning is called; the first is what templates read."""
_NO_PLACE = "the model's chat template has no place for them"
_SHORT_IDS = re.compile(rf"length\s*(?:!=|<)\s*{ID_LENGTH}\b")
"""In templates that refuse calls with other ids."""


class ChatTemplate:
    """Jinja that came with the weights, so it runs in a sandbox."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: by the name that templates use; what the model lacks is undefined."""
        self.source = source
        self._special_tokens = special_tokens
        self._probe = TemplateProbe(self._render)
        self._wants_short_ids = _SHORT_IDS.search(source) is not None
        self._wants_named_ids = kimi.ALL_BEGIN in source
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
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] = {},
        continue_final_message: bool = False,
    ) -> str:
        """`content` is text or a list of parts, and reaches the template as it is, unless the
        template takes only the other one; so do the arguments of calls, which are an object or its
        JSON. `tools`: as OpenAI has them. `variables`: what else the template may read.
        `continue_final_message`: the prompt ends where the text of the last message does.

        Raises NoChatTemplate when it does not compile, InvalidField when it refuses the messages,
        or has no place for tools.
        """
        ids = _named_ids(messages) if self._wants_named_ids else {}
        *before, last = [self._as_taken(message, ids) for message in messages]

        def ending_with(message: Mapping[str, Any]) -> str:
            return self._render(
                [*before, message],
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                variables=variables,
            )

        try:
            prompt = continued(last, ending_with) if continue_final_message else ending_with(last)
        except (InvalidField, NoChatTemplate):
            raise
        except Exception as error:  # templates compute what they like
            limit = "what the model's chat template takes"
            problem = f"cannot be rendered: {one_line(error)}"
            raise InvalidField("messages", problem, limit=limit) from error
        # What it refuses by itself it gives better reasons for.
        self._refuse_unshown(messages, has_tools=bool(tools))
        return prompt

    def _refuse_unshown(self, messages: Sequence[Mapping[str, Any]], *, has_tools: bool) -> None:
        """What the template would leave out without a word."""
        if has_tools and not self._probe.takes_tools:
            raise InvalidField("tools", "are not supported", limit=_NO_PLACE)
        for index, message in enumerate(messages):
            if message.get("tool_calls") and self._probe.call_form is None:
                path = f"messages[{index}].tool_calls"
                raise InvalidField(path, "are not supported", limit=_NO_PLACE)
            if message.get("role") == "tool" and not any(self._probe.takes("tool")):
                raise InvalidField(f"messages[{index}].role", "is 'tool'", limit=_NO_PLACE)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] = {},
    ) -> str:
        if self._compiled is None:
            raise NoChatTemplate(f"the model's chat template does not compile: {self.fault}")
        return self._compiled.render(
            {**self._special_tokens, **variables},
            messages=messages,
            tools=tools or None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
        )

    def _as_taken(self, message: Mapping[str, Any], ids: Mapping[str, str]) -> dict[str, Any]:
        """`ids`: of calls, what they are called here."""
        present = {key: value for key, value in message.items() if value is not None}
        reasoning = next((present[key] for key in _REASONING if key in present), None)
        if reasoning is not None:
            present = {"thinking": reasoning, **present, "reasoning_content": reasoning}
        content = present.get("content")
        takes = self._probe.takes(str(present.get("role")))
        if isinstance(content, str) and not takes.text and takes.parts:
            present["content"] = [{"type": "text", "text": content}]
        elif isinstance(content, list) and not takes.parts and _is_text_only(content):
            present["content"] = "\n".join(part["text"] for part in content)
        if "tool_call_id" in present:
            present["tool_call_id"] = self._call_id(present["tool_call_id"], ids)
        if present.get("tool_calls"):
            self._fit_calls(present, ids)
        return present

    def _fit_calls(self, message: dict[str, Any], ids: Mapping[str, str]) -> None:
        form = self._probe.call_form or CallForm(None, are_arguments_text=False)
        message["content"] = message.get("content") or form.empty_content
        message["tool_calls"] = [
            {
                **call,
                **({"id": self._call_id(call["id"], ids)} if "id" in call else {}),
                "function": {
                    **call["function"],
                    "arguments": form.arguments(call["function"]["arguments"]),
                },
            }
            for call in message["tool_calls"]
        ]

    def _call_id(self, call_id: str, ids: Mapping[str, str]) -> str:
        """A client may have it from elsewhere, in a form that this model's template refuses."""
        if call_id in ids:
            return ids[call_id]
        is_fitting = len(call_id) == ID_LENGTH and call_id.isascii() and call_id.isalnum()
        return call_id if is_fitting or not self._wants_short_ids else short_id(call_id)


@functools.lru_cache(maxsize=8)
def template_variables(source: str) -> frozenset[str]:
    """What a template reads and does not set by itself; nothing of one that does not compile."""
    try:
        return frozenset(meta.find_undeclared_variables(_environment().parse(source)))
    except Exception:  # what is no Jinja may fail in Jinja's lexer or in Python's
        return frozenset()


def _named_ids(messages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """By id, that which the template takes for a call's name."""
    calls = (call for message in messages for call in message.get("tool_calls") or ())
    return {
        call["id"]: kimi.named_id(call["function"]["name"], number)
        for number, call in enumerate(calls)
        if "id" in call
    }


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


RESERVED_NAMES = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
        *("chat_template", "tokenize", "return_dict", "loop", "self", "caller"),
        *_environment().globals,
    }
)
"""Variables of templates that are no switches."""
