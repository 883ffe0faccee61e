"""Hidden states that steps tell to who guesses by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.executor import Tapped
from baton.shared.engine.host_executor import HostExecutor
from baton.shared.engine.kv_cache import KvCache
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.sampling import SamplingParams
from tests.unit.worker.conftest import runners

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    make: Callable[..., ModelRunner] = runners(tmp_path_factory.mktemp)
    return make(16)


def executor_of(runner: ModelRunner, tapped: Tapped | None) -> HostExecutor:
    cache = KvCache(runner.arrangement, [16], 4, torch.float32)
    shape: dict[str, Any] = {"num_heads": 4, "vocab_size": 61, "max_model_len": 64, "min_rows": 16}
    return HostExecutor(runner._model, cache, torch.device("cpu"), **shape, tapped=tapped)


@pytest.mark.parametrize("layers", [(0, 1), (1, 0, 2)], ids=["", "to the end"])
def test_each_row_is_told_of_its_tokens(runner: ModelRunner, layers: tuple[int, ...]) -> None:
    """In chunks, decode rows, and rows with guesses; what is drawn is drawn without them, too."""
    tapped = Tapped(layers, 32, torch.float32, to_the_end=2 in layers)
    plain, telling = executor_of(runner, None), executor_of(runner, tapped)
    token_ids = [5, 9, 13, 7, 40, 5, 9, 13, 7]
    tables = [[[0, 1, 2]], [[3, 4, 5]]]
    batches = [
        [BatchRow(token_ids[:5], 0, tables[0], GREEDY), BatchRow(token_ids[:3], 0, tables[1])],
        [
            BatchRow(token_ids[5:6], 5, tables[0], GREEDY, draft_ids=token_ids[6:8]),
            BatchRow(token_ids[3:7], 3, tables[1]),
        ],
    ]
    told: list[list[torch.Tensor]] = [[], []]
    for rows in batches:
        with torch.inference_mode():
            step = telling.launch(Batch(rows))
            assert step.result() == plain.launch(Batch(rows)).result()
        for row, each in enumerate(rows):
            taps = step.taps(row)
            assert taps is not None and taps.shape == (each.num_tokens, 32 * len(layers))
            told[row].append(taps)
    model: Any = runner._model
    for count, of_row in zip((8, 7), told, strict=True):
        states = dict(zip(layers, torch.cat(of_row).chunk(len(layers), -1), strict=True))
        assert torch.equal(states[0], model.embedding[token_ids[:count]])
        if 2 in layers:
            rows = [BatchRow(token_ids[:count], 0, tables[0], num_logits=count)]
            with torch.inference_mode():
                # Of more rows than have bits of their own.
                padded = torch.cat([states[2], torch.zeros(16, 32)])
                assert torch.equal(model.logits(padded)[:count], plain.logits(Batch(rows)))
    # The same tokens in other company, and other chunks.
    assert torch.equal(torch.cat(told[0])[:7], torch.cat(told[1]))


def test_nothing_is_told_where_nobody_asks(runner: ModelRunner, tmp_path: Path) -> None:
    with torch.inference_mode():
        step = executor_of(runner, None).launch(Batch([BatchRow([5, 9], 0, [[0]], GREEDY)]))
    assert step.taps(0) is None
