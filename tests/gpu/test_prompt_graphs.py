"""Steps with prompt chunks in captured graphs against the same steps launched kernel by kernel: in
float32 they draw the same tokens, whatever is mixed and however long it is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.kernels import reference_float8
from baton.shared.engine import widened_keys
from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.kv.drawn import Drawn
from baton.shared.sampling import SamplingParams
from tests.gpu.conftest import MakeRunner
from tests.unit.engine.tiny_models import SIZES, TINY_MODELS, make_tiny

pytestmark = pytest.mark.gpu

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "grouped", {}),
    ("mistral", "windowed", {}),
    ("gemma4_text", "experts, caches shared", {}),
    ("gpt_oss", "as they come", {}),
    ("qwen3_next", "as they come", {}),
    ("mamba2", "as they come", {}),
    ("falcon_h1", "every multiplier", {}),
    (
        "deepseek_v3",
        "as they come",
        {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "v_head_dim": 32},
    ),
]
"""Type and case of tiny_models.py, and what is changed of it."""
NUM_TOKENS = 640
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
DRAWN = SamplingParams(temperature=0.9, top_k=30, seed=3, max_tokens=8)
NUM_ANSWER = 6


@pytest.mark.parametrize(("model_type", "case", "changes"), CASES)
def test_mixtures_of_chunks_and_decode_rows(
    model_type: str,
    case: str,
    changes: dict[str, Any],
    tmp_path: Path,
    make_gpu_runner: MakeRunner,
) -> None:
    """Prompts of awkward lengths, some behind long prefixes, one step ahead of what is known. Where
    layers keep states, those behind prompts and in the middle of chunks are the same, too."""
    fields = {**TINY_MODELS[model_type][case], "max_position_embeddings": 2048, **changes}
    make_tiny(tmp_path, model_type, fields)
    captured, launched = (
        make_gpu_runner(
            tmp_path,
            dtype="float32",
            prompt_graphs=graphs,
            num_blocks=800,
            max_num_seqs=16,
            state_checkpoints=16,
            token_budget=NUM_TOKENS,
        )
        for graphs in (True, False)
    )
    source = random.Random(8)
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300, 1100, 1500]
    prompts = [source.choices(range(SIZES["vocab_size"]), k=length) for length in lengths]
    plan = _plan(source, lengths)
    answers = [_run(runner, prompts, plan) for runner in (captured, launched)]
    assert answers[0] == answers[1]
    counts: Any = captured._executor
    assert counts.num_prompt_steps.captured > 10
    assert counts.num_prompt_steps.launched == 0
    for own, expected in zip(*map(_states, (captured, launched)), strict=True):
        limit = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(own, expected, atol=limit, rtol=0)


def _states(runner: ModelRunner) -> list[torch.Tensor]:
    caches = [cache for cache in runner.kv_cache.caches if not isinstance(cache, torch.Tensor)]
    return [each.float() for cache in caches for each in cache.values()]


def _plan(source: random.Random, lengths: list[int]) -> list[list[tuple[int, int, int]]]:
    """Steps of (prompt, first token, end); one token behind the prompt decodes."""
    at = [0] * len(lengths)
    ends = [length + NUM_ANSWER for length in lengths]
    plan = []
    while any(place < end for place, end in zip(at, ends, strict=True)):
        step, room = [], NUM_TOKENS
        open_ones = [i for i, end in enumerate(ends) if at[i] < end]
        for i in source.sample(open_ones, source.randint(1, len(open_ones))):
            most = 1 if at[i] >= lengths[i] else lengths[i] - at[i]
            taken = min(most, room, source.choice([1, 2, 16, 40, 200, 600]))
            if taken:
                step.append((i, at[i], at[i] + taken))
                at[i] += taken
                room -= taken
        plan.append(step)
    return plan


def _run(
    runner: ModelRunner, prompts: list[list[int]], plan: list[list[tuple[int, int, int]]]
) -> list[list[Drawn]]:
    block_size = runner.kv_cache.block_size
    tables, first = [], 0
    for number, prompt in enumerate(prompts):
        count = -(-(len(prompt) + NUM_ANSWER) // block_size)
        blocks = list(range(first, first + count))
        tables.append([blocks if group.spec.grows else [number] for group in runner.groups])
        first += count
    params = [(GREEDY, DRAWN)[number % 2] for number in range(len(prompts))]
    handles = [runner.open_row(each, 0) for each in params]
    drawn: list[list[Drawn]] = [[] for _ in prompts]
    in_flight: list[tuple[list[int], Any]] = []

    def take() -> None:
        rows, step = in_flight.pop(0)
        for i, tokens in zip(rows, step.result(), strict=True):
            drawn[i] += tokens

    for step in plan:
        rows = []
        for i, start, end in step:
            prompt = prompts[i]
            token_ids = prompt[start:end] if start < len(prompt) else None
            draws = params[i] if end >= len(prompt) else None
            row = BatchRow(token_ids, start, tables[i], draws, 0, handles[i])
            if runner.keeps_checkpoints and row.is_chunk and row.num_tokens % 2:
                slots = [NO_BLOCK if group.spec.grows else 16 + i for group in runner.groups]
                row.keeps = [(row.num_tokens // 2, slots)]
            rows.append(row)
        in_flight.append(([i for i, _, _ in step], runner.launch(Batch(rows))))
        if len(in_flight) > 1:
            take()
    take()
    for handle in handles:
        runner.close_row(handle)
    return drawn


@pytest.mark.parametrize(
    ("model_type", "case"),
    [("llama", "grouped"), ("mistral", "windowed"), ("gpt_oss", "as they come")],
)
def test_keys_and_values_in_bfloat16(
    model_type: str, case: str, tmp_path: Path, make_gpu_runner: MakeRunner
) -> None:
    """Where long chunks go to the kernel for compute capability 9.0, and short ones behind long
    prefixes beside them to another: what all tokens leave in the cache is what launches leave."""
    fields = {
        **TINY_MODELS[model_type][case],
        "max_position_embeddings": 4096,
        "num_hidden_layers": 4,
        "head_dim": 64,
    }
    make_tiny(tmp_path, model_type, fields, is_calm=True)
    captured, launched = (
        make_gpu_runner(
            tmp_path, dtype="bfloat16", prompt_graphs=graphs, num_blocks=1000, token_budget=2048
        )
        for graphs in (True, False)
    )
    for got, expected in _caches_of_both(captured, launched):
        limit = 0.02 * float(expected.abs().max())
        torch.testing.assert_close(got, expected, atol=limit, rtol=0)
    assert captured.num_prompt_steps.launched == 0


@pytest.mark.parametrize(
    ("model_type", "case", "most_tokens"),
    [
        ("llama", "grouped", 4096),
        ("gemma3_text", "five to one", 4096),
        ("llama", "grouped", 1536),
    ],
)
def test_keys_and_values_in_8_bits(
    model_type: str,
    case: str,
    most_tokens: int,
    tmp_path: Path,
    make_gpu_runner: MakeRunner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Long chunks have them widened for that kernel, but for what sees more than there is room for:
    the cache is what the kernel leaves that reads 8 bits. Rounding moves a code to the next one
    here and there, 2 to 9 % of a layer on a CPU; another prefix changed 38 to 105 % of it."""
    fields = {
        **TINY_MODELS[model_type][case],
        "max_position_embeddings": 4096,
        "num_hidden_layers": 3,
        "head_dim": 64,
    }
    if model_type == "gemma3_text":
        fields["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    make_tiny(tmp_path, model_type, fields, std=0.1)
    num_kv_heads = int({**SIZES, **fields}["num_key_value_heads"])
    monkeypatch.setattr(widened_keys, "_MOST_BYTES", most_tokens * 2 * num_kv_heads * 64 * 2)
    how: dict[str, Any] = {"num_blocks": 1000, "token_budget": 2048, "kv_cache_dtype": "fp8"}
    captured, launched = (
        make_gpu_runner(tmp_path, dtype="bfloat16", prompt_graphs=graphs, **how)
        for graphs in (True, False)
    )
    is_there = torch.cuda.get_device_capability() == (9, 0)
    for runner in (captured, launched):
        executor: Any = runner._executor
        assert (executor._context.widened is not None) == is_there
    monkeypatch.setattr(widened_keys, "widens", lambda kv, dtype, window: False)
    in_8_bits = make_gpu_runner(tmp_path, dtype="bfloat16", prompt_graphs=False, **how)
    for runner in (captured, launched):
        for got, expected in _caches_of_both(runner, in_8_bits):
            # Of each block and layer.
            error, size = (
                torch.linalg.vector_norm(each, dim=(1, 3, 4, 5))
                for each in (got - expected, expected)
            )
            assert bool((error <= 0.2 * size).all()), float((error / size).nan_to_num().max())
    assert captured.num_prompt_steps.launched == (0 if most_tokens == 4096 or not is_there else 3)


def _caches_of_both(
    runner: ModelRunner, other: ModelRunner
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Behind each of some steps, by cache group."""
    for each in (runner, other):
        each.kv_cache.memory.zero_()
    num_groups = len(runner.groups)

    def row(first_block: int, start: int, end: int) -> BatchRow:
        table = list(range(first_block, first_block + 150))
        tables = [[block + 450 * group for block in table] for group in range(num_groups)]
        token_ids = random.Random(first_block).choices(range(SIZES["vocab_size"]), k=end)[start:]
        return BatchRow(token_ids, start, tables, GREEDY)

    steps = [
        [row(0, 0, 300), row(150, 0, 1400)],
        [row(0, 300, 1301), row(150, 1400, 1462), row(300, 0, 7)],
        [row(0, 1301, 1310), row(150, 1462, 2100), row(300, 7, 207)],
        [row(0, 1310, 1374)],
    ]
    for step in steps:
        caches = []
        for each in (runner, other):
            each.forward(Batch(step))
            each.check_device()
            caches.append([_numbers(cache) for cache in each.kv_cache.caches])
        yield from zip(*caches, strict=True)


def _numbers(cache: Any) -> torch.Tensor:
    is_small = cache.dtype == reference_float8.DTYPE
    return reference_float8.widened(cache, torch.float32) if is_small else cache.float()
