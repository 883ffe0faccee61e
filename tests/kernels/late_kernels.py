"""Which kernels an engine needs only after it is ready, found out without a GPU.

    python -m tests.kernels.late_kernels MODEL_DIR DTYPE

Nothing is compiled and nothing runs: of each launch it is noted which kernel it needs, as Triton
tells them apart. Prints those that the warm-up has not had, as JSON. To be run without
TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from baton.shared.engine import device_choices
from baton.shared.engine.batch import Batch, BatchRow, WantedLogprobs
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.models import registry
from baton.shared.sampling import SamplingParams
from tests.kernels.compiled import recording
from tests.kernels.every_option import EVERY_OPTION
from tests.kernels.stand_in_graphs import StandInGraphs

MAX_NUM_SEQS = 12
MAX_CHUNK = 300
BLOCK_SIZE = 16
NUM_BLOCKS = 400
DRAWN = SamplingParams(temperature=0.9, top_p=0.9, top_k=40, seed=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("dtype")
    args = parser.parse_args()
    registry.register(EVERY_OPTION)
    noted: list[str] = []

    def note(self: Any, key: Any, signature: Any, device: Any, constants: Any, *_: Any) -> Any:
        noted.append(f"{self.fn.__name__} {constants} {signature}")
        kernel = SimpleNamespace(metadata=SimpleNamespace(name=self.fn.__name__))
        self.device_caches[device][0][key] = kernel
        return kernel

    JITFunction._do_compile = note
    device_choices.why_no_triton = lambda _: None  # type: ignore[assignment]
    with recording(90), torch.inference_mode():
        runner = _ready(args.model_dir, args.dtype)
        num_known = len(noted)
        for rows in _steps():
            for row in rows:
                row.block_tables = row.block_tables[: len(runner.groups)]
            runner.launch(Batch(rows))
    sys.stdout.write(json.dumps({"ready": num_known, "late": noted[num_known:]}) + "\n")


def _ready(model_dir: Path, dtype: str) -> ModelRunner:
    config = EngineConfig(
        model_dir,
        "cpu",
        dtype,
        kernels="triton",
        num_blocks=NUM_BLOCKS,
        max_num_seqs=MAX_NUM_SEQS,
        token_budget=MAX_CHUNK,
    )
    runner: Any = ModelRunner(config)
    # Warmed up as on a GPU, but for the sums of blocks, whose kernel knows nothing of models.
    device, runner.device = runner.device, SimpleNamespace(type="cuda")
    runner.block_sums = lambda: lambda *_: None
    executor = runner._executor
    executor.capture_prompts = partial(executor.capture_prompts, graphs=StandInGraphs())
    runner._warm_up(lambda _: None)
    runner.device = device
    ready: ModelRunner = runner
    return ready


def _steps() -> list[list[BatchRow]]:
    """As tests/gpu/test_no_late_compilation.py, fewer."""
    lengths = [*range(1, 40, 3), 63, 64, 65, 100, 131, 132, 133, 200, 255, 256, 257, MAX_CHUNK]
    steps = [[_chunk(length, sampling=DRAWN)] for length in lengths]
    steps += [[_chunk(length, start=70)] for length in (2, 16, 17, 64, 65, 230)]
    steps += [[_told_of(length)] for length in (2, 16, 17, 48, 49, 64, 65, MAX_CHUNK)]
    for num_rows in range(1, MAX_NUM_SEQS + 1):
        steps.append(_decode_rows(num_rows))
        steps.append([_chunk(2 + n % 9, sampling=DRAWN) for n in range(num_rows)])
        if num_rows < MAX_NUM_SEQS:
            for length in (2, 65, MAX_CHUNK - num_rows):
                steps.append([*_decode_rows(num_rows), _chunk(length, sampling=DRAWN)])
    return steps


def _chunk(length: int, start: int = 0, sampling: SamplingParams | None = None) -> BatchRow:
    return BatchRow([7] * length, start, _tables(start + length), sampling)


def _told_of(length: int) -> BatchRow:
    """A prompt whose logprobs are wanted."""
    row = _chunk(length, sampling=DRAWN)
    row.prompt_logprobs = WantedLogprobs(0, [7] * length, 2)
    return row


def _decode_rows(num_rows: int) -> list[BatchRow]:
    source = random.Random(num_rows)
    contexts = [source.randrange(1, MAX_CHUNK) for _ in range(num_rows)]
    return [BatchRow([5], length - 1, _tables(length), DRAWN) for length in contexts]


def _tables(length: int) -> list[list[int]]:
    """Nothing is written: rows, and cache groups, of which there are two at most, may have the same
    blocks."""
    return [list(range(-(-length // BLOCK_SIZE)))] * 2


if __name__ == "__main__":
    main()
