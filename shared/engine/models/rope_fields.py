"""Rotary embedding as config.json says it.

Files spell it in many ways: `rope_scaling` beside `rope_theta`, or `rope_parameters` with all in
one, flat or by kind of layer; `type` or `rope_type`. What is read is what transformers reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from baton.shared.engine.models.rope_config import RopeConfig, check_fit
from baton.shared.model_files.fields import Fields, shown

_SPELLINGS = ("rope_scaling", "rope_parameters")
_BASE_OF = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
"""Kinds of layers, and where files that do not tell ropes by kind have the base of each."""
_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
_RENAMED = {"su": "longrope", "mrope": "default"}
"""Other names in files. mrope turns by time, height and width, which are one for text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeRules:
    """What a model type's code in transformers makes of the fields; llama's by default."""

    theta: float | None = 10000.0
    """The base of a file that has none; None: it must have one."""
    partial_rotary_factor: float | None = None
    """Of a file that has none; None: the code turns whole heads."""
    original_max_position: int | None = None
    """`original_max_position_embeddings` of a file that has none beside the rope's fields."""
    is_interleaved: bool = False
    has_score_factor: bool = False
    """`mscale_all_dim` changes the scale of attention, of whatever type but the default."""
    has_query_scale: bool = False
    """`llama_4_scaling_beta` is read."""
    types: tuple[str, ...] = _TYPES
    """Those that the code takes."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Further names of rope types."""
    default: Mapping[str, Any] = field(default_factory=dict)
    """`rope_parameters` of a file that has no rope fields."""


LLAMA_RULES = RopeRules()


def read_rope(
    fields: Fields, max_position_embeddings: int, rules: RopeRules = LLAMA_RULES
) -> RopeConfig:
    """Rotary embedding of all layers, in whichever spelling.

    Raises:
        ModelError: a value is missing or not computed here, or two contradict each other.
    """
    reader = _Reader(fields, max_position_embeddings, rules)
    return reader.read_agreed([rope for name in _SPELLINGS if (rope := _given(fields, name))])


def read_ropes(
    fields: Fields, max_position_embeddings: int, rules: Mapping[str, RopeRules]
) -> dict[str, RopeConfig]:
    """Rotary embedding by kind of layer, full_attention and sliding_attention.

    `rope_parameters` has an object for each; `rope_theta` and `rope_scaling` are those of full
    attention, and `rope_local_base_freq` is the other's base.

    Args:
        rules: by kind; `default` is what is taken for the kind alone.

    Raises:
        ModelError: as of `read_rope`.
    """
    nested = fields.object("rope_parameters")
    ropes = {}
    for kind, base in _BASE_OF.items():
        given = [] if nested is None else [_given(nested, kind)]
        if given == [None] and rules[kind].default:
            raise fields.error(f"rope_parameters.{kind}", "missing")
        if kind == "full_attention":
            scaling = _given(fields, "rope_scaling")
            if scaling and scaling.get("rope_type") is None and scaling.has("type"):
                raise scaling.error("type", "is not read beside ropes by layer; rope_type is")
            given.append(scaling)
        beside = Fields(fields.path, {}) if nested is None else nested
        reader = _Reader(fields, max_position_embeddings, rules[kind], base, beside)
        ropes[kind] = reader.read_agreed([rope for rope in given if rope])
    return ropes


def check_ropes(fields: Fields, ropes: Iterable[tuple[RopeConfig, int]]) -> None:
    """Whether they fit heads of those sizes.

    Raises:
        ModelError: one does not.
    """
    for rope, head_dim in ropes:
        _check_sections(fields, int(head_dim * rope.partial_rotary_factor))
        try:
            check_fit(rope, head_dim)
        except ValueError as error:
            where = next((name for name in _SPELLINGS if fields.get(name)), "rope_parameters")
            raise fields.error(where, str(error)) from None


def _check_sections(fields: Fields, turning_dim: int) -> None:
    """Sections change nothing for text, but a file in which they do not fit is not to be trusted
    in what does."""
    for name in _SPELLINGS:
        rope = _given(fields, name)
        sections = None if rope is None else rope.integers("mrope_section")
        if rope is None or sections is None:
            continue
        if min(sections, default=-1) < 0 or sum(sections) != turning_dim // 2:
            raise rope.error(
                "mrope_section",
                f"{shown(sections)} do not add up to the {turning_dim // 2} pairs of a head",
            )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads one object of rope fields."""

    fields: Fields
    """What stands around it."""
    max_position: int
    rules: RopeRules
    base: str = "rope_theta"
    """The name of `rope_theta` in `fields`."""
    beside: Fields | None = None
    """Of ropes by kind of layer, what they stand beside in `rope_parameters`."""

    def read_agreed(self, given: list[Fields]) -> RopeConfig:
        """Of several spellings, which must say the same."""
        if not given:
            default = Fields(self.fields.path, dict(self.rules.default), "rope_parameters.")
            return self._read(default, is_default=True)
        read = [self._read(rope) for rope in given]
        if len(set(read)) > 1:
            raise self.fields.error("rope_scaling", "contradicts rope_parameters")
        return read[0]

    def _read(self, rope: Fields, *, is_default: bool = False) -> RopeConfig:
        # What is by kind of layer there is not for a type that knows one rope.
        for kind in _BASE_OF:
            rope.only(kind)
        for name in ("mrope_section", "mrope_interleaved", "max_position_embeddings"):
            rope.get(name)
        rope_type = self._type(rope)
        config = RopeConfig(
            theta=self._theta(rope, is_default),
            rope_type="default" if rope_type == "dynamic" else rope_type,
            partial_rotary_factor=self._partial_rotary_factor(rope, rope_type),
            is_interleaved=self.rules.is_interleaved,
        )
        match rope_type:
            case "linear":
                config = _linear(config, rope)
            case "dynamic":
                # Within the longest sequence that a worker takes, it is the default.
                rope.number("factor")
            case "llama3":
                config = _llama3(config, rope, self._original(rope))
            case "yarn":
                config = self._yarn(config, rope)
            case "longrope":
                config = self._longrope(config, rope)
            case "proportional":
                config = replace(config, factor=rope.number("factor", default=1.0))
        if self.rules.has_score_factor and rope_type != "default":
            config = replace(config, score_factor=_score_factor(rope))
        return self._with_query_scale(config, rope)

    def _type(self, rope: Fields) -> str:
        legacy_type = rope.get("type")
        name = rope.get("rope_type") or legacy_type or "default"
        renamed = {**_RENAMED, **self.rules.renamed}
        rope_type = renamed.get(name, name) if isinstance(name, str) else name
        if not isinstance(rope_type, str) or rope_type not in self.rules.types:
            known = ", ".join(self.rules.types)
            raise rope.error("rope_type", f"must be one of {known}, not {shown(name)}")
        return rope_type

    def _theta(self, rope: Fields, is_default: bool) -> float:
        if rope.get("rope_theta") is None:
            return self.fields.number(self.base, default=self.rules.theta)
        own = rope.number("rope_theta")
        if not is_default and self.fields.get(self.base) is not None:
            outer = self.fields.number(self.base)
            if own != outer:
                raise rope.error("rope_theta", f"{own} contradicts {self.base} {outer}")
        return own

    def _partial_rotary_factor(self, rope: Fields, rope_type: str) -> float:
        default, name = self.rules.partial_rotary_factor, "partial_rotary_factor"
        if rope_type == "default" and default is None:
            # transformers turns whole heads, whatever the file says.
            self.fields.says(name, 1)
            rope.says(name, 1)
            return 1.0
        where, value = self.fields, self.fields.number(name, default=default or 1.0)
        if rope.get(name) is not None:
            own = rope.number(name)
            if where.get(name) is not None and own != value:
                raise rope.error(name, f"{own} contradicts {name} {value}")
            where, value = rope, own
        if value > 1:
            raise where.error(name, f"must be at most 1, not {value}")
        if value != 1 and default is None and rope_type != "proportional":
            raise where.error(name, f"only 1 is supported with {rope_type}, not {value}")
        return value

    def _original(self, rope: Fields) -> int:
        name = "original_max_position_embeddings"
        value = rope.integer(name, default=self.max_position)
        if self.beside is not None:
            return value
        # The one outside counts, if there are two.
        return self.fields.integer(name, default=self.rules.original_max_position or value)

    def _yarn(self, config: RopeConfig, rope: Fields) -> RopeConfig:
        original = self._original(rope)
        factor = rope.number("factor", default=self.max_position / original)
        attention_factor = _mscale(factor, 1.0)
        mscale, all_dim = _number_or_zero(rope, "mscale"), _number_or_zero(rope, "mscale_all_dim")
        if mscale and all_dim:
            attention_factor = _mscale(factor, mscale) / _mscale(factor, all_dim)
        if config.theta <= 1:
            raise rope.error("rope_theta", f"must be more than 1 with yarn, not {config.theta}")
        # Of ropes by kind of layer, transformers looks for this one beside them.
        holder = rope if self.beside is None else self.beside
        return replace(
            config,
            factor=factor,
            original_max_position=original,
            attention_factor=rope.number("attention_factor", default=attention_factor),
            beta_fast=_number_or_zero(rope, "beta_fast") or 32.0,
            beta_slow=_number_or_zero(rope, "beta_slow") or 1.0,
            is_truncated=holder.boolean("truncate", default=True),
        )

    def _longrope(self, config: RopeConfig, rope: Fields) -> RopeConfig:
        original = self._original(rope)
        factor = rope.number("factor", default=self.max_position / original)
        attention_factor = 1.0
        if factor > 1:
            if original == 1:
                raise rope.error("original_max_position_embeddings", "must be more than 1")
            attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
        return replace(
            config,
            original_max_position=original,
            attention_factor=rope.number("attention_factor", default=attention_factor),
            short_factor=rope.numbers("short_factor"),
            long_factor=rope.numbers("long_factor"),
        )

    def _with_query_scale(self, config: RopeConfig, rope: Fields) -> RopeConfig:
        name = "llama_4_scaling_beta"
        if not self.rules.has_query_scale:
            return config
        if rope.get(name) is None:
            raise rope.error(name, "missing")
        original = config.original_max_position
        return replace(
            config,
            query_scale_beta=_number_or_zero(rope, name),
            original_max_position=original or rope.integer("original_max_position_embeddings"),
        )


def _given(fields: Fields, name: str) -> Fields | None:
    """None for a missing and for an empty object."""
    return None if fields.get(name) == {} else fields.object(name)


def _linear(config: RopeConfig, rope: Fields) -> RopeConfig:
    factor = rope.number("factor")
    return replace(config, rope_type="default" if factor == 1 else "linear", factor=factor)


def _llama3(config: RopeConfig, rope: Fields, original: int) -> RopeConfig:
    config = replace(
        config,
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=original,
    )
    if config.high_freq_factor <= config.low_freq_factor:
        raise rope.error("high_freq_factor", "must be greater than low_freq_factor")
    return config


def _mscale(factor: float, mscale: float) -> float:
    """How much yarn sharpens attention for so many times the context."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _score_factor(rope: Fields) -> float:
    all_dim = _number_or_zero(rope, "mscale_all_dim")
    return _mscale(rope.number("factor"), all_dim) ** 2 if all_dim else 1.0


def _number_or_zero(rope: Fields, name: str) -> float:
    """0 for a missing one, and where the file says so."""
    return rope.number(name) if rope.get(name) else 0.0
