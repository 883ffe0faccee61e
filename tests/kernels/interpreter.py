"""Triton's interpreter without what it does in vain, which takes it nearly half of its time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

from triton import language
from triton.runtime import interpreter

_LANGUAGES = (language, language.core)


def spare_work() -> None:
    """For the whole process; what is computed stays the same."""
    builder = interpreter.interpreter_builder
    # Whether integers overflow is looked at in 64 bits, and said to nobody but who debugs.
    builder.options = replace(builder.options, sanitize_overflow=False)
    # All types stand in a table that is made for every look into it.
    interpreter._get_np_dtype = _by_scalar_type(interpreter._get_np_dtype)
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)


def _by_scalar_type(look_up: Callable[[Any], Any]) -> Callable[[Any], Any]:
    pointer = look_up(language.pointer_type(language.int8))
    known = cache(look_up)

    def numpy_type(of: Any) -> Any:
        return pointer if isinstance(of.scalar, language.pointer_type) else known(of.scalar)

    return numpy_type


def _once_a_launch(put_into: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A kernel's functions of the language are replaced when it is launched, and back afterwards:
    not again with every function that it calls, unless that sees another module of them."""

    @cache
    def seen_by(function: Any) -> list[ModuleType]:
        return [
            each for each in function.__globals__.values() if any(each is x for x in _LANGUAGES)
        ]

    def put_once(function: Any) -> Any:
        if any(language.core.is_builtin(each.load) for each in seen_by(function)):
            return put_into(function)
        return interpreter._LangPatchScope()

    return put_once
