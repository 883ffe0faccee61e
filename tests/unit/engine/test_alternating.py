"""Layers with windows beside full ones, with other heads or not, against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baton.shared.engine.models import registry
from baton.shared.kv.cache_spec import Full, Sliding, cache_groups
from tests.alternating import make_alternating, register
from tests.unit.engine.conftest import TINY, MakeRunner
from tests.unit.engine.test_logits_vs_transformers import check_logits, check_tokens

FULL, SLIDING = "full_attention", "sliding_attention"
FIELDS: dict[str, Any] = {
    **TINY,
    "num_hidden_layers": 3,
    "layer_types": [SLIDING, FULL, SLIDING],
    "sliding_window": 40,
}
OTHER_HEADS = {"sliding_num_key_value_heads": 4, "sliding_head_dim": 24}
SHAPES: dict[str, dict[str, Any]] = {
    "other-heads": {**FIELDS, **OTHER_HEADS},
    "equal-heads": {**FIELDS, "num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2},
    "window-of-one": {**FIELDS, **OTHER_HEADS, "sliding_window": 1},
    "full-layer-last": {**FIELDS, "layer_types": [SLIDING] * 2 + [FULL], "sliding_window": 16},
}


@pytest.fixture(autouse=True)
def alternating(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_TYPES", dict(registry._TYPES))
    register()
    yield


def test_layers_of_equal_specs_share_a_group(tmp_path: Path) -> None:
    make_alternating(tmp_path, SHAPES["other-heads"])
    _, config = registry.load_model_config(tmp_path)
    windowed, full = cache_groups(config.cache_specs)
    assert (windowed.spec, windowed.layer_ids) == (Sliding(4, 24, 40), (0, 2))
    assert (full.spec, full.layer_ids) == (Full(2, 16), (1,))
    assert windowed.block_bytes(16, 4) != full.block_bytes(16, 4)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits(shape: str, tmp_path: Path, make_runner: MakeRunner) -> None:
    model = make_alternating(tmp_path, SHAPES[shape])
    check_logits(model, make_runner(tmp_path), min_span=10)


@pytest.mark.exact
@pytest.mark.parametrize("shape", ["other-heads"])
def test_greedy_tokens(shape: str, tmp_path: Path, make_runner: MakeRunner) -> None:
    model = make_alternating(tmp_path, SHAPES[shape])
    check_tokens(model, make_runner(tmp_path))
