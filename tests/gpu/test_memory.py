"""Memory that is not there: said when a worker starts, and borne when a step meets with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.shared.engine.batch import Batch
from baton.shared.engine.config import ModelError
from benchmarks.in_process import InProcessEngine, random_prompts
from tests.gpu.conftest import DEMO, MakeRunner

pytestmark = pytest.mark.gpu

NUM_PROMPT, NUM_ANSWER, NUM_LONG = 40, 30, 900


def test_weights_that_do_not_fit(tmp_path: Path, make_gpu_runner: MakeRunner) -> None:
    """16 GB of weights on 5 % of the GPU; nothing big is allocated to find out."""
    config = json.loads((DEMO / "config.json").read_text())
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    (tmp_path / "config.json").write_text(
        json.dumps({**config, **sizes, **heads, "vocab_size": 128256, "eos_token_id": 1})
    )
    before = torch.cuda.memory_reserved()
    with pytest.raises(ModelError) as caught:
        make_gpu_runner(tmp_path, load_format="dummy", gpu_memory_utilization=0.05)
    message = re.fullmatch(
        r"model: the weights take ([\d.]+) GiB, ([\d.]+) GiB of the GPU may be used "
        r"\(gpu_memory_utilization 0\.05\): ([\d.]+) GiB missing",
        str(caught.value),
    )
    assert message is not None, caught.value
    wanted, room, missing = map(float, message.groups())
    assert missing == pytest.approx(wanted - room, abs=0.011) and wanted > 12
    assert torch.cuda.memory_reserved() - before < 2**30


def test_a_pool_that_does_not_hold_one_sequence(make_gpu_runner: MakeRunner) -> None:
    with pytest.raises(ModelError, match=r"^max_model_len: .* missing; set num_blocks") as caught:
        make_gpu_runner(DEMO, num_blocks=None, gpu_memory_utilization=0.005)
    # Not the pool's few megabytes only: what the engine needs beside it is missing too.
    missing = re.search(r"([\d.]+) GiB missing", str(caught.value))
    assert missing is not None and float(missing[1]) > 0.3, caught.value


def test_more_blocks_than_memory(make_gpu_runner: MakeRunner) -> None:
    with pytest.raises(ModelError, match="num_blocks: 1000000000 blocks .* do not fit"):
        make_gpu_runner(DEMO, num_blocks=10**9)


@pytest.mark.parametrize("where", ["launch", "_launch"], ids=["before the step", "within it"])
def test_a_step_without_memory_fails_one_request(
    where: str, make_gpu_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one whose chunk it is; others that decode go on, and so does the engine."""
    runner = make_gpu_runner(DEMO, num_blocks=256)
    engine = InProcessEngine(runner, max_num_seqs=8)
    steps: Any = runner._steps
    launch = getattr(steps, where)
    failed: list[int] = []

    def launch_or_fail(batch: Batch, *more: object) -> object:
        if any(row.num_tokens > 2 * NUM_PROMPT for row in batch.rows):
            failed.append(len(batch.rows))
            # More than any GPU has: refused as it would be in a step that is too large.
            torch.empty(2**44, dtype=torch.uint8, device="cuda")
        return launch(batch, *more)

    monkeypatch.setattr(steps, where, launch_or_fail)
    vocab_size = runner.model_config.vocab_size
    for prompt in random_prompts(3, NUM_PROMPT, vocab_size):
        engine.submit(prompt, NUM_ANSWER)
    for _ in range(8):
        engine.engine.run_once(may_wait=False)
    num_before = sum(engine.steps.num_tokens)
    assert 0 < num_before < 3 * NUM_ANSWER
    [long] = random_prompts(1, NUM_LONG, vocab_size)
    engine.submit(long, NUM_ANSWER)
    with pytest.raises(RuntimeError, match="OutOfMemoryError"):
        engine.run_until_idle()
    assert len(engine.failures) == 1
    # Together with those that decode, then by itself.
    assert failed == [4, 1]
    assert num_before + sum(engine.steps.num_tokens) == 3 * NUM_ANSWER
    assert engine.pool.num_free == runner.num_blocks

    engine.failures.clear()
    monkeypatch.undo()
    engine.submit(long, NUM_ANSWER)
    assert sum(engine.run_until_idle().num_tokens) == NUM_ANSWER
    assert engine.pool.num_free == runner.num_blocks
