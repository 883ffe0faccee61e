"""Once a runner is ready, no step and no sum waits for a kernel to be compiled or loaded."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.sampling import SamplingParams
from tests.gpu.conftest import DEMO

pytestmark = pytest.mark.gpu

MAX_NUM_SEQS = 40
MAX_CHUNK = 600
NUM_BLOCKS = 1100
BLOCK_SIZE = 16
GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=0.9, top_p=0.9, top_k=40, min_p=0.01, seed=3)
LENGTHS = [*range(1, 140), *range(140, MAX_CHUNK, 7), 255, 256, 257, 511, 512, 513, MAX_CHUNK]


@pytest.fixture(scope="module", params=["bfloat16", "float32", "bfloat16 with drafts"])
def runner(request: pytest.FixtureRequest) -> ModelRunner:
    dtype, _, drafts = request.param.partition(" ")
    forget_kernels()
    return ModelRunner(
        EngineConfig(
            DEMO,
            "cuda",
            dtype,
            kernels="triton",
            num_blocks=NUM_BLOCKS,
            max_num_seqs=MAX_NUM_SEQS,
            token_budget=MAX_CHUNK,
            num_drafts=3 if drafts else 0,
        )
    )


def forget_kernels() -> None:
    """Those that other tests of this process have compiled must not hide that one comes late."""
    import triton

    for name, module in list(sys.modules.items()):
        if name.startswith("baton.kernels."):
            for value in vars(module).values():
                if isinstance(value, triton.JITFunction):
                    value.device_caches.clear()


@pytest.fixture
def late(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Kernels that came after the runner was ready; it must stay empty.

    One that Triton finds in its cache on disk counts: it must be loaded, and another machine's
    cache may not have it.
    """
    import triton

    names: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        names.append(f"{getattr(src, 'name', src)} {getattr(src, 'constants', '')}")

    monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
    yield names
    assert not names, f"{len(names)} kernels were late, such as {names[0]}"


def chunk(num_tokens: int, start: int = 0, sampling: SamplingParams | None = None) -> BatchRow:
    """Over a prefix of `start` tokens that is taken for cached."""
    table = list(range(-(-(start + num_tokens) // BLOCK_SIZE)))
    return BatchRow([7] * num_tokens, start, [table], sampling)


def decode_rows(num_rows: int, first_block: int = 100) -> list[BatchRow]:
    """Of contexts of 1 to 300 tokens, each in its own blocks as far as they go."""
    source = random.Random(num_rows)
    contexts = [source.randrange(1, 300) for _ in range(num_rows)]
    return [
        BatchRow([5], length - 1, [[first_block + n * 20 + b for b in range(20)]], DRAWN)
        for n, length in enumerate(contexts)
    ]


def test_a_listener_hears_of_kernels(late: list[str]) -> None:
    """Else the other tests prove nothing."""
    import torch

    from baton.kernels.gated_mul import gated_mul

    # An odd size of a type that the runner has no use for.
    gated_mul(torch.zeros(3, 2 * 24, device="cuda", dtype=torch.float16))
    assert late
    late.clear()


@pytest.mark.parametrize("sampling", [GREEDY, None], ids=["drawn", "not drawn"])
def test_chunks_of_any_length(
    runner: ModelRunner, late: list[str], sampling: SamplingParams | None
) -> None:
    for num_tokens in LENGTHS:
        runner.forward(Batch([chunk(num_tokens, sampling=sampling)]))


def test_chunks_over_cached_prefixes(runner: ModelRunner, late: list[str]) -> None:
    for num_tokens, start in ((1, 600), (2, 16), (16, 1), (17, 512), (100, 33), (600, 2048)):
        runner.forward(Batch([chunk(num_tokens, start, GREEDY)]))


def test_packed_chunks(runner: ModelRunner, late: list[str]) -> None:
    for num_rows in range(2, MAX_NUM_SEQS + 1):
        runner.forward(Batch([chunk(2 + n % 9, sampling=GREEDY) for n in range(num_rows)]))
    runner.forward(Batch([chunk(200), chunk(2), chunk(398, sampling=GREEDY)]))


def test_decode_batches_of_any_size(runner: ModelRunner, late: list[str]) -> None:
    for num_rows in range(1, MAX_NUM_SEQS + 1):
        runner.forward(Batch(decode_rows(num_rows)))


def test_decode_with_chunks(runner: ModelRunner, late: list[str]) -> None:
    for num_rows in range(1, MAX_NUM_SEQS):
        for num_tokens in (2, 15, 16, 33, 64, 65, 129, MAX_CHUNK - num_rows):
            rows = [*decode_rows(num_rows), chunk(num_tokens, sampling=GREEDY)]
            runner.forward(Batch(rows))


def test_rows_with_drafts(runner: ModelRunner, late: list[str]) -> None:
    for num_rows in range(1, MAX_NUM_SEQS):
        rows = decode_rows(num_rows)
        for number, row in enumerate(rows):
            row.draft_ids = [7] * (number % (runner.num_drafts + 1))
        runner.forward(Batch(rows))
        runner.forward(Batch([*rows, chunk(2 + num_rows, sampling=GREEDY)]))


def test_sums_of_any_number_of_blocks(runner: ModelRunner, late: list[str]) -> None:
    sums = runner.block_sums()
    for num_blocks in range(1, 601):
        sums(list(range(num_blocks)))
    sums(list(range(NUM_BLOCKS)))
