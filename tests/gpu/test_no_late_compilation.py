"""Once a runner is ready, no step and no sum waits for a kernel to be compiled or loaded."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from baton.shared.engine import widened_keys
from baton.shared.engine.batch import Batch, BatchRow, WantedLogprobs
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.shaping import KnownTokens
from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.sampling import SamplingParams
from tests.gpu.conftest import DEMO
from tests.unit.engine.tiny_models import TINY_MODELS, make_tiny

pytestmark = pytest.mark.gpu

MAX_NUM_SEQS = 40
MAX_CHUNK = 600
NUM_BLOCKS = 1100
BLOCK_SIZE = 16
GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=0.9, top_p=0.9, top_k=40, min_p=0.01, seed=3)
SHAPED = SamplingParams(
    temperature=0.9,
    presence_penalty=1.0,
    frequency_penalty=0.5,
    repetition_penalty=1.3,
    logit_bias=((5, 1.0), (9, -100.0)),
    min_tokens=3,
    stop_token_ids=frozenset((11,)),
    logprobs=3,
    seed=4,
)
LENGTHS = [*range(1, 140), *range(140, MAX_CHUNK, 7), 255, 256, 257, 511, 512, 513, MAX_CHUNK]


TYPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "windows": ("mistral", "windowed", {}),
    "gemma3, heads of 256": ("gemma3_text", "five to one", {"head_dim": 256}),
    "gemma4, heads of 256 and 512": (
        "gemma4_text", "keys are values", {"head_dim": 256, "global_head_dim": 512},
    ),
    "gemma4, caches shared, drafts": ("gemma4_text", "experts, caches shared", {}),
    "qwen3_moe": ("qwen3_moe", "as they come", {}),
    "delta rule, drafts": ("qwen3_next", "as they come", {}),
    "mamba2 beside attention, drafts": ("falcon_h1", "every multiplier", {}),
    "gpt_oss, drafts": ("gpt_oss", "as they come", {}),
    "latents, drafts": (
        "deepseek_v3", "as they come",
        {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "v_head_dim": 32},
    ),
    "windows, 8 bits": ("mistral", "windowed", {"head_dim": 64}),
    "8 bits, little room": ("gpt_oss", "as they come", {"head_dim": 64}),
    "8 bits, drafts": ("gemma3_text", "five to one", {"head_dim": 256}),
}  # fmt: skip
"""Models of which kernels have not seen the like in the demo: type and case of tiny_models.py, and
what is changed of it."""


@pytest.fixture(scope="module", params=["bfloat16", "float32", "bfloat16, drafts", *TYPES])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    model_dir = DEMO
    if request.param in TYPES:
        model_dir = tmp_path_factory.mktemp("tiny")
        model_type, case, changes = TYPES[request.param]
        fields = {**TINY_MODELS[model_type][case], "max_position_embeddings": 4096, **changes}
        make_tiny(model_dir, model_type, fields, is_calm=True)
    forget_kernels()
    with pytest.MonkeyPatch.context() as patch:
        if "little room" in request.param:
            patch.setattr(widened_keys, "_MOST_BYTES", 2**18)
        return ModelRunner(
            EngineConfig(
                model_dir,
                "cuda",
                "float32" if request.param == "float32" else "bfloat16",
                kernels="triton",
                num_blocks=NUM_BLOCKS,
                max_num_seqs=MAX_NUM_SEQS,
                token_budget=MAX_CHUNK,
                num_drafts=3 if request.param.endswith("drafts") else 0,
                kv_cache_dtype="fp8" if "8 bits" in request.param else "auto",
                state_checkpoints=8,
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


def run(runner: ModelRunner, rows: Sequence[BatchRow]) -> None:
    """All cache groups get the same blocks, and all rows the same slot: what they hold does not
    matter."""
    wide = [
        replace(
            row,
            block_tables=[
                row.block_tables[0] if group.spec.grows else [0] for group in runner.groups
            ],
        )
        for row in rows
    ]
    runner.forward(Batch(wide))


def chunk(num_tokens: int, start: int = 0, sampling: SamplingParams | None = None) -> BatchRow:
    """Over a prefix of `start` tokens that is taken for cached."""
    table = list(range(-(-(start + num_tokens) // BLOCK_SIZE)))
    return BatchRow([7] * num_tokens, start, [table], sampling)


def decode_rows(
    num_rows: int, first_block: int = 100, sampling: SamplingParams = DRAWN
) -> list[BatchRow]:
    """Of contexts of 1 to 300 tokens, each in its own blocks as far as they go."""
    source = random.Random(num_rows)
    contexts = [source.randrange(1, 300) for _ in range(num_rows)]
    return [
        BatchRow([5], length - 1, [[first_block + n * 20 + b for b in range(20)]], sampling)
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
        run(runner, [chunk(num_tokens, sampling=sampling)])


def test_chunks_over_cached_prefixes(runner: ModelRunner, late: list[str]) -> None:
    for num_tokens, start in ((1, 600), (2, 16), (16, 1), (17, 512), (100, 33), (600, 2048)):
        run(runner, [chunk(num_tokens, start, GREEDY)])


def test_packed_chunks(runner: ModelRunner, late: list[str]) -> None:
    for num_rows in range(2, MAX_NUM_SEQS + 1):
        run(runner, [chunk(2 + n % 9, sampling=GREEDY) for n in range(num_rows)])
    run(runner, [chunk(200), chunk(2), chunk(398, sampling=GREEDY)])


def test_chunks_of_which_states_are_kept(runner: ModelRunner, late: list[str]) -> None:
    """In the middle and at the end, of one row and of several; without states, nothing."""
    slots = [NO_BLOCK if group.spec.grows else 1 for group in runner.groups]
    for num_tokens in (2, 16, 17, 63, 64, 65, 128, 300, MAX_CHUNK - 3):
        for kept in ([1], [num_tokens // 2], [num_tokens - 1], [num_tokens], [1, num_tokens]):
            asked = chunk(num_tokens, sampling=GREEDY)
            asked.keeps = [(num, slots) for num in kept]
            run(runner, [asked])
            run(runner, [*decode_rows(3), asked])
    asked = chunk(100, 32)
    asked.keeps = [(32, slots), (96, slots)]
    run(runner, [chunk(2), asked, chunk(129), asked])


def test_decode_batches_of_any_size(runner: ModelRunner, late: list[str]) -> None:
    for num_rows in range(1, MAX_NUM_SEQS + 1):
        run(runner, decode_rows(num_rows))


def test_decode_with_chunks(runner: ModelRunner, late: list[str]) -> None:
    for num_rows in range(1, MAX_NUM_SEQS):
        for num_tokens in (2, 15, 16, 33, 64, 65, 129, MAX_CHUNK - num_rows):
            rows = [*decode_rows(num_rows), chunk(num_tokens, sampling=GREEDY)]
            run(runner, rows)


def test_rows_with_drafts(runner: ModelRunner, late: list[str]) -> None:
    for num_rows in range(1, MAX_NUM_SEQS):
        rows = decode_rows(num_rows)
        for number, row in enumerate(rows):
            row.draft_ids = [7] * (number % (runner.num_drafts + 1))
        run(runner, rows)
        run(runner, [*rows, chunk(2 + num_rows, sampling=GREEDY)])


def test_rows_that_ask_for_more(runner: ModelRunner, late: list[str]) -> None:
    """Penalties, biases, bans, masks and logprobs, of rows with drafts too where there are any."""
    vocab_size = runner.model_config.vocab_size
    mask = np.full(-(-vocab_size // 32), 0x5555_5555, np.uint32)
    past = KnownTokens([7] * MAX_CHUNK, 1, ((7, 7, 3), (4,)))
    for num_rows in (1, 2, 3, 7, 15, 16, 17, 30, MAX_NUM_SEQS - 1):
        for num_drafts in range(runner.num_drafts + 1):
            for sampling, masks in ((SHAPED, None), (GREEDY, mask), (SHAPED, mask)):
                rows = [*decode_rows(num_rows, sampling=sampling), chunk(33, sampling=sampling)]
                for row in rows:
                    row.history = past
                    if not row.is_chunk:
                        row.draft_ids = [7] * num_drafts
                    if masks is not None:
                        row.masks = np.stack([masks] * (1 + len(row.draft_ids)))
                run(runner, rows[:-1])
                run(runner, rows)


def test_prompts_that_are_told_of(runner: ModelRunner, late: list[str]) -> None:
    for num_tokens in (1, 2, 15, 16, 17, 40, 47, 48, 49, 63, 64, 65, 300, MAX_CHUNK - 3):
        for start in (0, 40):
            asked = chunk(num_tokens, start, GREEDY)
            asked.prompt_logprobs = WantedLogprobs(0, [7] * num_tokens, 5)
            run(runner, [asked])
            run(runner, [*decode_rows(3), asked])


def test_sums_of_any_number_of_blocks(runner: ModelRunner, late: list[str]) -> None:
    sums = runner.block_sums()
    for num_blocks in range(1, 601):
        sums(list(range(num_blocks)))
    sums(list(range(NUM_BLOCKS)))
