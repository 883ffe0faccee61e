"""Settings of the engine: which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baton.shared.engine.config import EngineConfig, most_model_len
from baton.shared.model_files.fields import ModelError


def test_max_model_len_is_limited_by_the_model(tmp_path: Path) -> None:
    assert most_model_len(EngineConfig(tmp_path), 512) == 512
    assert most_model_len(EngineConfig(tmp_path, max_model_len=100), 512) == 100
    # What fits is known later.
    assert most_model_len(EngineConfig(tmp_path, max_model_len="auto"), 512) == 512
    with pytest.raises(ModelError, match=r"max_model_len: 513 .* max_position_embeddings 512"):
        most_model_len(EngineConfig(tmp_path, max_model_len=513), 512)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", "tpu"),
        ("dtype", "float64"),
        ("block_size", 24),
        ("block_size", 256),
        ("num_blocks", 0),
        ("max_model_len", 0),
        ("token_budget", 0),
    ],
)
def test_engine_settings_out_of_range(field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=field):
        EngineConfig(**{"model_dir": tmp_path, field: value})
