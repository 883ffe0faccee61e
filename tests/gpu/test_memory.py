"""Memory that is not there: said when a worker starts, and borne when a step meets with it."""

from __future__ import annotations

import json
import random
import re
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.services.worker import messages as msg
from baton.services.worker.sequence_table import Recipient
from baton.services.worker.stepper import BatchLimits
from baton.shared.engine.batch import Batch
from baton.shared.engine.config import DeviceError
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.model_files.fields import ModelError
from baton.shared.sampling import SamplingParams
from tests.gpu.conftest import DEMO, MakeRunner
from tests.unit.engine.tiny_models import TINY_MODELS, make_tiny
from tests.unit.worker.sim_worker import SimWorker

pytestmark = pytest.mark.gpu

NUM_PROMPT, NUM_ANSWER, NUM_LONG = 40, 30, 900


class OneWorker(SimWorker):
    """Alone: what it tells its gateway is counted."""

    def __init__(self, runner: ModelRunner) -> None:
        limits = BatchLimits(runner.token_budget, max_num_seqs=8)
        super().__init__("gpu", "ab" * 16, runner, lambda _, mail: self._count(mail), limits)
        self.num_tokens = 0
        self.failures: list[str] = []
        self._numbers = count(1)

    def submit(self, prompt: list[int]) -> None:
        number = next(self._numbers)
        params = SamplingParams(temperature=0.0, max_tokens=NUM_ANSWER, ignore_eos=True)
        sequence = Sequence(AttemptKey(f"request-{number}", 0, 1), tuple(prompt), params)
        self.inbox.put(msg.StartDecode(sequence, Recipient(self.gateway_stream, number), None))

    def step(self) -> None:
        self.engine.run_once(may_wait=False)

    def run_until_idle(self) -> None:
        self.step()
        while self.engine.num_sequences or self.engine.is_busy:
            self.step()

    def _count(self, mail: list[msg.Outgoing]) -> None:
        for message in mail:
            if isinstance(message, msg.ToGateway):
                response = message.message
                self.num_tokens += len(response.step.slots)
                if response.HasField("failed"):
                    self.failures.append(response.failed.failure.message)


def prompt(num_tokens: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(16, 4096), k=num_tokens)


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
        r"\(gpu_memory_utilization 0\.05\): ([\d.]+) GiB missing; raise gpu_memory_utilization",
        str(caught.value),
    )
    assert message is not None, caught.value
    wanted, room, missing = map(float, message.groups())
    assert missing == pytest.approx(wanted - room, abs=0.011) and wanted > 12
    assert torch.cuda.memory_reserved() - before < 2**30


def test_a_pool_that_does_not_hold_one_sequence(make_gpu_runner: MakeRunner) -> None:
    with pytest.raises(ModelError, match=r"^max_model_len: .* missing; ") as caught:
        make_gpu_runner(DEMO, num_blocks=None, gpu_memory_utilization=0.005)
    # Not the pool's few megabytes only: what the engine needs beside it is missing too.
    missing = re.search(r"([\d.]+) GiB missing", str(caught.value))
    assert missing is not None and float(missing[1]) > 0.3, caught.value


def test_more_blocks_than_memory(make_gpu_runner: MakeRunner) -> None:
    with pytest.raises(ModelError, match="num_blocks: 1000000000 blocks .* do not fit"):
        make_gpu_runner(DEMO, num_blocks=10**9)


@pytest.mark.parametrize("where", ["launch", "_begin_step"], ids=["before the step", "within it"])
def test_a_step_without_memory_fails_one_request(
    where: str, make_gpu_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one whose chunk it is; others that decode go on, and so does the engine."""
    runner = make_gpu_runner(DEMO, num_blocks=256)
    engine = OneWorker(runner)
    steps: Any = runner._executor
    launch = getattr(steps, where)
    failed: list[int] = []

    def launch_or_fail(batch: Batch, *more: object) -> object:
        if any(row.num_tokens > 2 * NUM_PROMPT for row in batch.rows):
            failed.append(len(batch.rows))
            # More than any GPU has: refused as it would be in a step that is too large.
            torch.empty(2**44, dtype=torch.uint8, device="cuda")
        return launch(batch, *more)

    monkeypatch.setattr(steps, where, launch_or_fail)
    for number in range(3):
        engine.submit(prompt(NUM_PROMPT, number))
    for _ in range(8):
        engine.step()
    assert 0 < engine.num_tokens < 3 * NUM_ANSWER
    long = prompt(NUM_LONG, 3)
    engine.submit(long)
    engine.run_until_idle()
    [failure] = engine.failures
    assert "OutOfMemoryError" in failure
    # Together with those that decode, then by itself.
    assert failed == [4, 1]
    assert engine.num_tokens == 3 * NUM_ANSWER
    assert engine.leftovers == {}

    monkeypatch.undo()
    engine.submit(long)
    engine.run_until_idle()
    assert engine.num_tokens == 4 * NUM_ANSWER and len(engine.failures) == 1
    assert engine.leftovers == {}


def test_kernels_that_the_gpu_has_no_room_for_are_told_with_both_sizes(
    tmp_path: Path, make_gpu_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU with less shared memory than these were written for."""
    monkeypatch.setattr("triton.compiler.compiler.max_shared_mem", lambda device: 1024)
    # Of sizes that no other test has: of a kernel that is loaded already nothing is asked.
    fields = {"linear_key_head_dim": 48, "linear_value_head_dim": 48}
    make_tiny(tmp_path, "qwen3_5_text", {**TINY_MODELS["qwen3_5_text"]["all linear"], **fields})
    with pytest.raises(DeviceError, match=r"one takes \d+ of shared memory, and .* 1024"):
        make_gpu_runner(tmp_path, dtype="float32")
