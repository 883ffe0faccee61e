"""What config.json says of how linear layers are stored. No torch here.

Read in shared/engine/models/quantization.py; what the tensors say is compared with it in the forms
beside this file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["int", "float"]
_PATTERN = "re:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """How activations are made small in front of a layer, to 8 bits around zero."""

    kind: Kind
    group_size: int | None = None
    """So many numbers of a row have a scale of their own; None: all of a row."""
    is_static: bool = False
    """The checkpoint has a scale for all rows; else each is scaled by what it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Of the weights of some layers. None: the tensors say it."""

    num_bits: int
    kind: Kind = "int"
    group_size: int | None = None
    """So many numbers of a row have a scale of their own; −1: all of a row."""
    block: tuple[int, int] | None = None
    """Rows and columns that have a scale together."""
    is_symmetric: bool = True
    """There are no zeros but the middle of the range."""
    order: str | None = None
    """The field by which config.json says that a tensor tells which column is of which run; None:
    runs are of neighbours, unless there is such a tensor."""
    strategy: str | None = None
    """What shares a scale, as compressed-tensors calls it: tensor, channel, group, …"""
    form: str | None = None
    """The `format` of compressed-tensors."""
    inputs: Inputs | None = None
    """None: activations stay as they are."""

    @property
    def numbers(self) -> str:
        return f"{self.kind}{self.num_bits}"


@dataclass(frozen=True, slots=True)
class Rule:
    """Which modules a scheme is for."""

    targets: tuple[str, ...]
    """Names of modules, `re:` and what begins them, or classes such as Linear."""
    scheme: Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    method: str
    """As `quant_method` says it."""
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    """As targets."""
    zeros_are_less_one: bool = False
    """GPTQ's first format."""

    def scheme(self, module: str) -> Scheme | None:
        """None: the module is to be plain. A rule that names the module comes before one that
        names its class."""
        if any(_is_named(each, module) for each in self.ignored):
            return None
        for is_meant in (_is_named, _is_of_class):
            for rule in self.rules:
                if any(is_meant(target, module) for target in rule.targets):
                    return rule.scheme
        return None


def _is_named(target: str, module: str) -> bool:
    if target.startswith(_PATTERN):
        return re.match(target.removeprefix(_PATTERN), module) is not None
    return module == target


def _is_of_class(target: str, module: str) -> bool:
    """Classes are not known here: whatever holds quantised weights is of one that is named."""
    return target[:1].isupper() and "." not in target


def compiles(target: str) -> bool:
    """Whether a target is a name, or a pattern that can be searched for."""
    try:
        re.compile(target.removeprefix(_PATTERN))
    except (re.error, RecursionError, OverflowError):
        return not target.startswith(_PATTERN)
    return True


EVERY_LINEAR = ("Linear",)
