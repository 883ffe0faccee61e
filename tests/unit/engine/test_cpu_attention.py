"""Fused attention of 16-bit numbers on a CPU against the plain form in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from baton.kernels.cpu_attention import fused_attention, plan_fused_attention
from baton.kernels.reference import paged_attention, plan_attention
from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.host_executor import HostExecutor
from baton.shared.engine.model_runner import ModelRunner
from tests.unit.engine.conftest import MakeLlama
from tests.unit.engine.tiny_models import TINY_MODELS, make_tiny

BLOCK, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 16, 2, 6, 2, 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 20, 300])
@pytest.mark.parametrize(
    "rows",
    [
        [(1, 1)],
        [(1, 33)],
        [(1, 400), (1, 390), (1, 31), (1, 16)],
        [(40, 40)],
        [(1, 200), (1, 7), (150, 290), (3, 18)],
        [(1, 120), (1, 200)],
        [(1, 300), (1, 262)],
    ],
    ids=["first", "one", "unequal", "prompt", "mixed", "wanted", "fewer tiles first"],
)
def test_it_is_the_plain_form_rounded(
    rows: list[tuple[int, int]], window: int | None, dtype: torch.dtype
) -> None:
    """Rows of (tokens, context); blocks in any order; what no token may see holds NaN, and blocks
    that a window has left are gone."""
    source, generator = np.random.default_rng(3), torch.Generator().manual_seed(3)
    num_tokens = sum(each for each, _ in rows)
    num_blocks = sum(-(-context // BLOCK) for _, context in rows)
    shape = (num_blocks + 1, KV_HEADS, LAYERS, 2, BLOCK, HEAD_DIM)
    kv = torch.randn(shape, generator=generator).to(dtype)
    kv[-1] = 0
    free = source.permutation(num_blocks).tolist()
    table = np.full((len(rows), max(-(-context // BLOCK) for _, context in rows)), -1)
    for row, (count, context) in enumerate(rows):
        for place in range(-(-context // BLOCK)):
            block = free.pop()
            if window is not None and (place + 1) * BLOCK <= context - count + 1 - window:
                kv[block] = float("nan")
                continue
            table[row, place] = block
            kv[block, :, :, :, max(context - place * BLOCK, 0) :] = float("nan")
    query = torch.randn(num_tokens, HEADS, HEAD_DIM, generator=generator).to(dtype)
    start = np.concatenate(([0], np.cumsum([count for count, _ in rows])))
    contexts = np.array([context for _, context in rows])
    slots = np.full(num_tokens, -1)
    step = (start, contexts, table, slots)
    plan = plan_fused_attention(*step, kv, num_heads=HEADS, window=window)
    plain = plan_attention(*step, kv.float(), num_heads=HEADS, min_rows=1, window=window)
    found = fused_attention(query, kv, 1, plan, 0.3)
    expected = paged_attention(query.float(), kv.float(), 1, plain, 0.3)
    assert found.dtype == dtype and found.shape == query.shape
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)


def test_sequences_of_a_step_do_not_change_places(make_llama: MakeLlama) -> None:
    """One that decodes stands before a longer one whose prompt ends."""
    model, _ = make_llama(std=0.1)
    runner = ModelRunner(EngineConfig(model, "cpu", "bfloat16", num_blocks=32))
    short, long = ([token % 60 for token in range(5, 5 + length)] for length in (120, 200))
    tables = [[list(range(8))], [list(range(8, 21))]]
    runner.logits(Batch([BatchRow(short[:-1], 0, tables[0])]))
    rows = [BatchRow(short[-1:], 119, tables[0]), BatchRow(long, 0, tables[1])]
    together = runner.logits(Batch(rows)).float()
    alone = torch.cat([runner.logits(Batch([row])).float() for row in rows])
    assert float((together - alone).norm() / alone.norm()) < 0.02


def test_only_what_needs_the_plain_form_takes_it(make_llama: MakeLlama, tmp_path: Path) -> None:
    """float32, whose bits count, and layers with caps or sinks."""
    llama, _ = make_llama()

    def fuses(model: Path, dtype: str) -> bool:
        runner = ModelRunner(EngineConfig(model, "cpu", dtype, num_blocks=8))
        runner.logits(Batch([BatchRow([1, 2, 3], 0, [[0]] * len(runner.groups))]))
        executor = runner._executor
        assert isinstance(executor, HostExecutor)
        return executor._fuses_attention

    assert fuses(llama, "bfloat16") and not fuses(llama, "float32")
    for name in ("gemma2", "gpt_oss"):
        make_tiny(tmp_path / name, name, TINY_MODELS[name]["as they come"])
        assert not fuses(tmp_path / name, "bfloat16")
