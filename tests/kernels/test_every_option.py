"""The engine over the Triton kernels against the torch reference, in a model of all options."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.sampling import SamplingParams
from tests.device import ROOT, process_environment
from tests.kernels.every_option import CONFIG, EVERY_OPTION, write_model
from tests.made_up_types import known

pytestmark = [
    pytest.mark.usefixtures("few_programs"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning"),
]
Make = Callable[[str, torch.device], ModelRunner]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory: Path = tmp_path_factory.mktemp("options")
    with known(EVERY_OPTION):
        write_model(directory)
        yield directory


@pytest.fixture(scope="module")
def make(directory: Path) -> Make:
    def make_runner(kernels: str, device: torch.device) -> ModelRunner:
        config = EngineConfig(
            directory, device.type, "float32", kernels=kernels, num_blocks=40, max_num_seqs=4
        )
        return ModelRunner(config)

    return make_runner


def test_chunks_and_decode_rows(make: Make, device: torch.device) -> None:
    """Tokens of a step whose unwanted ones stop before the layers that store nothing, and logits of
    one that goes on from there. Contexts end within the window and beyond it."""
    runner, reference = make("triton", device), make("torch", torch.device("cpu"))
    source = random.Random(1)
    tokens = [source.choices(range(CONFIG["vocab_size"]), k=n) for n in (20, 5)]
    # By cache group; the two may share a pool.
    tables = [[[7, 3], [8, 4]], [[12], [13]]]
    greedy = SamplingParams(temperature=0.0)

    def row(which: int, start: int, end: int) -> BatchRow:
        return BatchRow(tokens[which][start:end], start, tables[which], greedy)

    prompts = Batch([row(0, 0, 13), row(1, 0, 4)])
    assert runner.forward(prompts) == reference.forward(prompts)
    mixed = Batch([row(1, 4, 5), row(0, 13, 19)])
    expected = reference.logits(mixed)
    error = (runner.logits(mixed).cpu() - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-4


def test_all_kernels_are_there_when_the_engine_is_ready(directory: Path) -> None:
    """Not in this process, which interprets kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.late_kernels", str(directory), "bfloat16"],
        env=process_environment(), cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ready"] > 20
    assert report["late"] == []
