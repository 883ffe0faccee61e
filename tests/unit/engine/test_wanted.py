"""Tokens behind which nothing is drawn go no further than the last layer that stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.determinism import MIN_LINEAR_ROWS
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.models.blocks import GatedMlp
from baton.shared.sampling import SamplingParams
from tests.unit.engine.tiny_models import TINY_MODELS, make_tiny

GREEDY = SamplingParams(temperature=0)


pytestmark = pytest.mark.exact


@pytest.fixture
def runner(tmp_path: Path) -> ModelRunner:
    """Of five layers, the upper three read what the others store."""
    make_tiny(tmp_path, "gemma4_text", TINY_MODELS["gemma4_text"]["shared"])
    return ModelRunner(EngineConfig(tmp_path, device="cpu", num_blocks=64))


@pytest.fixture
def num_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each MLP that is computed."""
    counts: list[int] = []
    compute = GatedMlp.__call__

    def count(self: GatedMlp, hidden: torch.Tensor, *others: Any) -> torch.Tensor:
        counts.append(len(hidden))
        return compute(self, hidden, *others)

    monkeypatch.setattr(GatedMlp, "__call__", count)
    return counts


def row(length: int, sampling: SamplingParams | None, first: int = 0) -> BatchRow:
    tables = [list(range(first, first + 8)), list(range(first + 8, first + 16))]
    return BatchRow(list(range(length)), 0, tables, sampling)


def test_only_what_is_wanted_reaches_layers_without_a_cache(
    runner: ModelRunner, num_rows: list[int]
) -> None:
    assert [layer.source for layer in runner.model_config.attentions] == [None, None, 0, 0, 1]
    # Behind the second layer's keys and values there is nothing to compute.
    runner.forward(Batch([row(100, None)]))
    assert num_rows == [100]
    num_rows.clear()
    runner.forward(Batch([row(100, GREEDY), row(50, None, 16), row(30, GREEDY, 32)]))
    assert num_rows == [180] + 4 * [MIN_LINEAR_ROWS]


def test_what_is_wanted_is_what_all_tokens_bring(runner: ModelRunner) -> None:
    """Logits of many tokens of a row, of few, and of one, bit for bit."""
    every = row(100, None)
    every.num_logits = 100
    expected = runner.logits(Batch([every])).clone()
    for count in (99, 17, 1):
        few = row(100, None)
        few.num_logits = count
        beside = row(20, None, 16)
        assert torch.equal(runner.logits(Batch([beside, few]))[1:], expected[-count:])
