"""How large a constraint may be, found out before anything is made of it or keeps it. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from baton.shared.rpc.errors import InvalidField
from baton.v1 import types_pb2

MAX_BYTES = 1 << 18
"""Of all schemas, grammars and texts of a constraint together, in UTF-8."""
MAX_CHOICES = 1024
MAX_TAGS = 128
MAX_TRIGGERS = 128
MAX_BEGIN = 256
"""Tokens, or bytes, behind which the constrained text begins."""
_MAX_MESSAGE_BYTES = MAX_BYTES + (1 << 14)
"""Of the message: what protobuf adds, and fields that nobody here knows."""


def check_size(constraint: types_pb2.Constraint) -> None:
    """Raises InvalidField, naming the field that is too large, or what is so together."""
    _check_begin_after(constraint)
    num_bytes = 0
    for field, text in _texts(constraint):
        length = len(text.encode())
        if length > MAX_BYTES:
            raise InvalidField(field, f"has {length} bytes", limit=f"{MAX_BYTES} bytes")
        num_bytes += length
    if num_bytes > MAX_BYTES:
        problem, limit = f"has {num_bytes} bytes in all", f"{MAX_BYTES} bytes in all"
        raise InvalidField(f"constraint.{constraint.WhichOneof('kind')}", problem, limit=limit)
    whole = constraint.ByteSize()
    if whole > _MAX_MESSAGE_BYTES:
        limit = f"{_MAX_MESSAGE_BYTES} bytes"
        raise InvalidField("constraint", f"has {whole} bytes as a message", limit=limit)


def _texts(constraint: types_pb2.Constraint) -> Iterator[tuple[str, str]]:
    """With the field of each. Raises InvalidField for too many."""
    kind = constraint.WhichOneof("kind")
    field = f"constraint.{kind}"
    match kind:
        case "json_schema" | "regex" | "lark" | "gbnf":
            yield field, getattr(constraint, kind)
        case "choices":
            texts = constraint.choices.texts
            if not 1 <= len(texts) <= MAX_CHOICES:
                limit = f"1 to {MAX_CHOICES} texts"
                raise InvalidField(field, f"has {len(texts)} texts", limit=limit)
            yield from ((f"{field}.texts[{index}]", text) for index, text in enumerate(texts))
        case "structural_tags":
            tags, triggers = constraint.structural_tags.tags, constraint.structural_tags.triggers
            if not 1 <= len(tags) <= MAX_TAGS:
                limit = f"1 to {MAX_TAGS} tags"
                raise InvalidField(field, f"has {len(tags)} tags", limit=limit)
            if len(triggers) > MAX_TRIGGERS:
                problem, limit = f"has {len(triggers)} texts", f"{MAX_TRIGGERS} texts"
                raise InvalidField(f"{field}.triggers", problem, limit=limit)
            for index, trigger in enumerate(triggers):
                yield f"{field}.triggers[{index}]", trigger
            for index, tag in enumerate(tags):
                for name in ("begin", "end", tag.WhichOneof("content")):
                    if name is not None:
                        yield f"{field}.tags[{index}].{name}", getattr(tag, name)


def _check_begin_after(constraint: types_pb2.Constraint) -> None:
    field, begin_after = "constraint.begin_after", constraint.begin_after
    match begin_after.WhichOneof("end"):
        case "token_ids":
            num_tokens = len(begin_after.token_ids.token_ids)
            if not 1 <= num_tokens <= MAX_BEGIN:
                limit = f"1 to {MAX_BEGIN} tokens"
                raise InvalidField(f"{field}.token_ids", f"has {num_tokens} tokens", limit=limit)
        case "text":
            num_bytes = len(begin_after.text.encode())
            if not 1 <= num_bytes <= MAX_BEGIN:
                limit = f"1 to {MAX_BEGIN} bytes"
                raise InvalidField(f"{field}.text", f"has {num_bytes} bytes", limit=limit)
