"""Ropes of config.json: all spellings, and what is refused in one line before weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baton.shared.engine.models.rope_config import RopeConfig, describe_choices
from baton.shared.engine.models.rope_fields import (
    LLAMA_RULES,
    RopeRules,
    check_ropes,
    read_rope,
    read_ropes,
)
from baton.shared.model_files.fields import Fields, ModelError

MAX_POSITION = 4096
FULL, SLIDING = "full_attention", "sliding_attention"
PARTIAL = RopeRules(partial_rotary_factor=0.5)
QUERY_SCALE = RopeRules(has_query_scale=True)
BY_KIND = {FULL: RopeRules(theta=1e6), SLIDING: RopeRules()}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 9]}
YARN = {"rope_type": "yarn", "factor": 4.0}


def read(values: dict[str, Any], rules: RopeRules = LLAMA_RULES) -> RopeConfig:
    return read_rope(Fields(Path("config.json"), values), MAX_POSITION, rules)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 4},
        {"rope_type": "dynamic", "factor": 4},
        {**LLAMA3, "original_max_position_embeddings": 64},
        {**YARN, "original_max_position_embeddings": 64, "beta_fast": 16},
        {**LONG, "original_max_position_embeddings": 64},
        {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    ],
)
def test_all_spellings_are_one(parameters: dict[str, Any]) -> None:
    legacy = {("type" if name == "rope_type" else name): v for name, v in parameters.items()}
    expected = read({"rope_parameters": {**parameters, "rope_theta": 5e5}})
    is_default = expected == read({"rope_theta": 5e5})
    assert is_default == (parameters["rope_type"] == "dynamic")
    for spelling in ("rope_scaling", "rope_parameters"):
        for fields in (parameters, legacy, {**parameters, "type": "default"}):
            assert read({spelling: fields, "rope_theta": 5e5}) == expected
            assert read({spelling: {**fields, "rope_theta": 5e5}}) == expected
    both = {"rope_scaling": legacy, "rope_parameters": parameters, "rope_theta": 5e5}
    assert read(both) == expected
    if "original_max_position_embeddings" in parameters:
        # transformers gives the one outside precedence.
        outside = {"rope_parameters": parameters, "original_max_position_embeddings": 32}
        assert read(outside).original_max_position == 32
        assert read({"rope_parameters": parameters}).original_max_position == 64


def test_names_of_types() -> None:
    longrope = read({"rope_scaling": LONG})
    assert read({"rope_scaling": {**LONG, "rope_type": "su"}}) == longrope
    of_phi3 = RopeRules(partial_rotary_factor=1.0, renamed={"yarn": "longrope"})
    assert read({"rope_scaling": {**LONG, "rope_type": "yarn"}}, of_phi3) == longrope
    assert read({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}) == read({})


def test_defaults_of_a_type() -> None:
    rules = RopeRules(theta=2e6, partial_rotary_factor=0.5, is_interleaved=True)
    expected = RopeConfig(2e6, "default", partial_rotary_factor=0.5, is_interleaved=True)
    assert read({}, rules) == read({"rope_parameters": {"rope_type": "default"}}, rules) == expected
    assert read({"partial_rotary_factor": 0.25}, rules).partial_rotary_factor == 0.25
    inside = read({"rope_parameters": {"partial_rotary_factor": 0.25}}, rules)
    assert inside.partial_rotary_factor == 0.25
    of_phi3 = RopeRules(original_max_position=1024)
    assert read({"rope_scaling": LONG}, of_phi3).original_max_position == 1024
    default = {**YARN, "rope_theta": 1e6, "llama_4_scaling_beta": 0.1}
    rules = RopeRules(has_query_scale=True, default=default)
    rope = read({"rope_theta": 5e5}, rules)
    assert (rope.rope_type, rope.theta, rope.query_scale_beta) == ("yarn", 1e6, 0.1)
    beta = {"llama_4_scaling_beta": 0.2, "original_max_position_embeddings": 99}
    rope = read({"rope_parameters": beta}, rules)
    assert (rope.rope_type, rope.query_scale_beta) == ("default", 0.2)
    assert rope.original_max_position == 99


def test_what_depends_on_the_worker_is_named() -> None:
    """It becomes part of the capability: workers that differ here never read each other's keys."""
    rope = read({"rope_scaling": {**LONG, "original_max_position_embeddings": 1024}})
    others = [read({}), read({"rope_scaling": YARN}), rope]
    assert describe_choices(others, 1024) == "longrope short"
    assert describe_choices([*others, *others], 1025) == "longrope long"
    assert describe_choices(others[:2], 4096) == ""


def test_by_kind_of_layer() -> None:
    def read_both(values: dict[str, Any], rules: Any = BY_KIND) -> dict[str, RopeConfig]:
        return read_ropes(Fields(Path("config.json"), values), MAX_POSITION, rules)

    plain = {FULL: RopeConfig(1e6, "default"), SLIDING: RopeConfig(1e4, "default")}
    assert read_both({}) == plain
    # What is not by kind is not read there.
    assert read_both({"rope_parameters": {"rope_type": "linear", "factor": 2}}) == plain
    linear = RopeConfig(1e6, "linear", 8.0)
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    scaling = {"rope_type": "linear", "factor": 8}
    assert read_both({**old, "rope_scaling": scaling}) == {**plain, FULL: linear}
    assert read_both({"rope_parameters": {FULL: scaling}}) == {**plain, FULL: linear}
    both = {"rope_scaling": scaling, "rope_parameters": {FULL: scaling, SLIDING: None}}
    assert read_both(both) == {**plain, FULL: linear}
    for values, reason in (
        ({"rope_scaling": {"type": "linear", "factor": 8}}, "rope_scaling.type: is not read"),
        ({**both, "rope_scaling": {"rope_type": "default"}}, "rope_scaling: contradicts"),
        ({"rope_parameters": {FULL: 3}}, "rope_parameters.full_attention: must be an object"),
        (
            {"rope_parameters": {SLIDING: {"rope_theta": 1.0}}, "rope_local_base_freq": 2},
            "rope_parameters.sliding_attention.rope_theta: 1.0 contradicts rope_local_base_freq",
        ),
    ):
        with pytest.raises(ModelError, match=f"^config.json: {reason}"):
            read_both(values)
    rules = {kind: RopeRules(theta=None, default={"rope_theta": 9.0}) for kind in BY_KIND}
    assert {rope.theta for rope in read_both({}, rules).values()} == {9.0}
    with pytest.raises(ModelError, match="rope_parameters.sliding_attention: missing"):
        read_both({"rope_parameters": {FULL: {"rope_theta": 9.0}}}, rules)


@pytest.mark.parametrize(
    ("values", "rules", "reason"),
    [
        ({"rope_scaling": {"rope_type": "ntk"}}, LLAMA_RULES, 'rope_scaling.rope_type: .*"ntk"'),
        ({"rope_scaling": {"rope_type": 3}}, LLAMA_RULES, "rope_scaling.rope_type: .* not 3"),
        ({"rope_scaling": {"type": "linear"}}, LLAMA_RULES, "rope_scaling.factor: missing"),
        ({"rope_scaling": {"type": "dynamic"}}, LLAMA_RULES, "rope_scaling.factor: missing"),
        ({"rope_scaling": {**YARN, "factor": 0}}, LLAMA_RULES, "rope_scaling.factor"),
        ({"rope_scaling": {**YARN, "beta_fast": -1}}, LLAMA_RULES, "rope_scaling.beta_fast"),
        ({"rope_scaling": {**YARN, "mscale": "1", "mscale_all_dim": 1}}, LLAMA_RULES, "mscale"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, LLAMA_RULES, "rope_scaling.truncate"),
        ({"rope_scaling": YARN, "rope_theta": 1}, LLAMA_RULES, "rope_scaling.rope_theta"),
        ({"rope_scaling": {**YARN, "attention_factor": -1}}, LLAMA_RULES, "attention_factor"),
        ({"rope_scaling": {**LONG, "long_factor": None}}, LLAMA_RULES, "long_factor: missing"),
        ({"rope_scaling": {**LONG, "long_factor": [1, "2"]}}, LLAMA_RULES, "long_factor: must"),
        ({"rope_scaling": {**LONG, "short_factor": [0, 1]}}, LLAMA_RULES, "short_factor: must"),
        ({"rope_scaling": {**LONG, "short_factor": 2}}, LLAMA_RULES, "short_factor: must"),
        (
            {"rope_scaling": {**LONG, "original_max_position_embeddings": 1}},
            LLAMA_RULES,
            "rope_scaling.original_max_position_embeddings: must be more than 1",
        ),
        (
            {"rope_scaling": {**YARN, "original_max_position_embeddings": 64.5}},
            LLAMA_RULES,
            "rope_scaling.original_max_position_embeddings",
        ),
        (
            {"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}},
            LLAMA_RULES,
            "rope_scaling.partial_rotary_factor: only 1 is supported with yarn, not 0.5",
        ),
        (
            {"rope_scaling": YARN, "partial_rotary_factor": 0.5},
            LLAMA_RULES,
            "partial_rotary_factor: only 1",
        ),
        ({"partial_rotary_factor": 1.5}, PARTIAL, "partial_rotary_factor: must be at most 1"),
        (
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}},
            PARTIAL,
            "rope_parameters.partial_rotary_factor: 0.25 contradicts",
        ),
        ({"rope_parameters": {"rope_theta": 9}, "rope_theta": 8}, PARTIAL, "contradicts"),
        ({"rope_parameters": {FULL: YARN}}, LLAMA_RULES, "rope_parameters.full_attention"),
        ({"rope_parameters": YARN}, QUERY_SCALE, "rope_parameters.llama_4_scaling_beta: missing"),
        (
            {"rope_parameters": {"llama_4_scaling_beta": 0.1}},
            QUERY_SCALE,
            "rope_parameters.original_max_position_embeddings: missing",
        ),
        ({}, RopeRules(theta=None), "rope_theta: missing"),
    ],
)
def test_what_is_refused(values: dict[str, Any], rules: RopeRules, reason: str) -> None:
    with pytest.raises(ModelError, match=f"^config.json: .*{reason}") as caught:
        read(values, rules)
    assert "\n" not in str(caught.value)


def test_factors_must_fit_the_heads() -> None:
    fields = Fields(Path("config.json"), {"rope_scaling": LONG})
    rope = read_rope(fields, MAX_POSITION)
    check_ropes(fields, [(rope, 4)])
    reason = "rope_scaling: short_factor has 2 entries, and heads of 16 turn 8 pairs"
    with pytest.raises(ModelError, match=f"^config.json: {reason}"):
        check_ropes(fields, [(rope, 16)])
    odd = Fields(Path("config.json"), {"rope_parameters": {**YARN, "partial_rotary_factor": 0.3}})
    yarn = read_rope(odd, MAX_POSITION, PARTIAL)
    check_ropes(odd, [(yarn, 20)])
    with pytest.raises(ModelError, match="rope_parameters: yarn turns an even share .* 7 of 24"):
        check_ropes(odd, [(yarn, 24)])
