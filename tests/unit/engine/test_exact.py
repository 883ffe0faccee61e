"""The class `exact`: float32 logits are bit-equal whatever shares the step with a token."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baton.kernels.reference_delta import DeltaGates, gated_delta
from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.sampling import SamplingParams
from tests.kernels.state_cases import ways_to_compute
from tests.unit.engine.conftest import MakeLlama, MakeRunner
from tests.unit.engine.tiny_deltas import TINY_DELTAS
from tests.unit.engine.tiny_models import make_tiny

pytestmark = pytest.mark.exact

SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "head-dim-24": {"hidden_size": 96, "num_key_value_heads": 4, "intermediate_size": 101},
    "one-kv-head": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 40},
    "wide": {"hidden_size": 320, "intermediate_size": 688, "num_attention_heads": 10},
}
# Tiles of 128 keys are crossed by all of one thread, twice by one. Two threads mostly wait for each
# other, wide awake.
CASES = [
    ("grouped", 1, 300),
    *((shape, 1, 140) for shape in SHAPES if shape != "grouped"),
    ("head-dim-24", 2, 20),
]
CACHES = ("auto", "fp8")


def token_ids(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(320), k=length)


def logits_of_parts(
    runner: ModelRunner, tokens: list[int], table: list[int], parts: list[int]
) -> dict[int, Tensor]:
    """Feeds tokens in parts of the given sizes → logits by the position of each part's end."""
    result, position = {}, 0
    for size in parts:
        row = BatchRow(tokens[position : position + size], position, [table])
        position += size
        result[position] = runner.logits(Batch([row]))[0].clone()
    assert position == len(tokens)
    return result


def random_parts(total: int, seed: int) -> list[int]:
    generator, parts = random.Random(seed), []
    while total:
        parts.append(min(total, generator.choice([1, 1, 2, 3, 5, 7, 16, 17, 31, 64, 129])))
        total -= parts[-1]
    return parts


@pytest.mark.parametrize(
    ("shape", "num_threads", "length", "cache"),
    [*((*case, "auto") for case in CASES), ("head-dim-24", 1, 70, "fp8")],
)
def test_chunks_and_single_tokens_equal_one_pass(
    shape: str,
    num_threads: int,
    length: int,
    cache: str,
    make_llama: MakeLlama,
    make_runner: MakeRunner,
) -> None:
    torch.set_num_threads(num_threads)
    model_dir, _ = make_llama(**SHAPES[shape])
    runner = make_runner(model_dir, kv_cache_dtype=cache)
    assert runner.determinism == "exact"
    tokens = token_ids(length, seed=1)
    table = random.Random(2).sample(range(128), 19)

    one_by_one = logits_of_parts(runner, tokens, table, [1] * length)
    for seed in range(3):
        for end, logits in logits_of_parts(
            runner, tokens, table, random_parts(length, seed)
        ).items():
            assert torch.equal(logits, one_by_one[end]), f"differs at position {end}"
    for end in (1, 15, 16, 17, *(end for end in (128, 129) if end < length), length):
        whole = runner.logits(Batch([BatchRow(tokens[:end], 0, [table])]))[0]
        assert torch.equal(whole, one_by_one[end]), f"one pass of {end} tokens differs"


@pytest.mark.parametrize(
    ("shape", "cache"), [*((shape, "auto") for shape in SHAPES), ("grouped", "fp8")]
)
def test_alone_equals_in_a_batch(
    shape: str, cache: str, make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    """Rows that decode, start, and go on with a chunk, in one step and in shuffled order."""
    model_dir, _ = make_llama(**SHAPES[shape])
    runner = make_runner(model_dir, num_blocks=600, kv_cache_dtype=cache)
    generator = random.Random(3)
    lengths = [1, 2, 16, 17, 33, 100, 127, 128, 129, 130, 200, 256, 257, 300, 5, 64, 31, 150]
    prompts = [token_ids(length, seed=length) for length in lengths]
    ids = iter(generator.sample(range(600), 600))
    tables = [[next(ids) for _ in range(20)] for _ in prompts]
    alone = [
        runner.logits(Batch([BatchRow(prompt, 0, [table])]))[0].clone()
        for prompt, table in zip(prompts, tables, strict=True)
    ]

    for round_number in range(3):
        runner.kv_cache.tensors[0].zero_()
        rows = []
        for i, (prompt, table) in enumerate(zip(prompts, tables, strict=True)):
            last = [1, min(len(prompt), 40), len(prompt)][(i + round_number) % 3]
            start = len(prompt) - last
            if start:
                runner.logits(Batch([BatchRow(prompt[:start], 0, [table])]))
            rows.append(BatchRow(prompt[start:], start, [table]))
        shuffled = generator.sample(range(len(rows)), len(rows))
        together = runner.logits(Batch([rows[i] for i in shuffled]))
        for place, i in enumerate(shuffled):
            assert torch.equal(together[place], alone[i]), f"row of {lengths[i]} tokens differs"


@pytest.mark.parametrize("cache", CACHES)
def test_a_shared_prefix_equals_a_computed_one(
    cache: str, make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama()
    runner = make_runner(model_dir, kv_cache_dtype=cache)
    prefix, rest = token_ids(160, seed=1), token_ids(45, seed=2)
    runner.logits(Batch([BatchRow(prefix + token_ids(20, seed=3), 0, [list(range(12))])]))
    table = list(range(10)) + [40, 41, 42]
    warm = runner.logits(Batch([BatchRow(rest, 160, [table])]))
    cold = runner.logits(Batch([BatchRow(prefix + rest, 0, [list(range(60, 73))])]))
    assert torch.equal(warm, cold)


@pytest.mark.parametrize(
    ("block_size", "cache"), [(1, "auto"), (2, "fp8"), (8, "auto"), (128, "auto")]
)
def test_block_size_does_not_matter(
    block_size: int, cache: str, make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama()
    tokens = token_ids(150, seed=1)
    usual = make_runner(model_dir, kv_cache_dtype=cache).logits(
        Batch([BatchRow(tokens, 0, [list(range(10))])])
    )
    runner = make_runner(model_dir, block_size=block_size, num_blocks=160, kv_cache_dtype=cache)
    table = list(range(159, 159 - -(-150 // block_size), -1))
    logits_of_parts(runner, tokens[:140], table, random_parts(140, seed=1))
    assert torch.equal(runner.logits(Batch([BatchRow(tokens[140:], 140, [table])])), usual)


def test_how_attention_is_cut_to_save_memory_does_not_matter(
    make_llama: MakeLlama, make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir, _ = make_llama()
    runner = make_runner(model_dir)
    prompts = [token_ids(length, seed=length) for length in (300, 140, 20, 130)]
    tables = [list(range(32 * i, 32 * i + 20)) for i in range(4)]
    fill = [BatchRow(p[:-1], 0, [t]) for p, t in zip(prompts, tables, strict=True)]
    decode = [BatchRow(p[-1:], len(p) - 1, [t]) for p, t in zip(prompts, tables, strict=True)]
    usual = [runner.logits(Batch(rows)).clone() for rows in (fill, decode)]
    monkeypatch.setattr("baton.kernels.reference._SCRATCH_BYTES", 1)
    assert torch.equal(runner.logits(Batch(fill)), usual[0])
    assert torch.equal(runner.logits(Batch(decode)), usual[1])


@pytest.mark.parametrize("cache", CACHES)
def test_what_lies_in_unused_slots_does_not_matter(
    cache: str, make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    """NaN everywhere but in the slots of tokens already computed, before every step."""
    model_dir, _ = make_llama()
    runner = make_runner(model_dir, kv_cache_dtype=cache)
    tokens, table = token_ids(200, seed=1), random.Random(2).sample(range(128), 13)
    parts = [100, 37] + [1] * 63
    clean = logits_of_parts(runner, tokens, table, parts)
    poisons = {torch.float32: float("nan"), torch.int8: 0x7F, torch.uint8: 0xFF}
    views = [(view, poisons[view.dtype]) for view in runner.kv_cache.typed(0)]
    for view, poison in views:
        view.fill_(poison)
    position = 0
    for size in parts:
        row = BatchRow(tokens[position : position + size], position, [table])
        other = BatchRow([3], 0, [[next(block for block in range(128) if block not in table)]])
        position += size
        assert torch.equal(runner.logits(Batch([other, row]))[1], clean[position])
        for view, poison in views:
            kept = view[table].clone()
            kept[-(-position // 16) :] = poison
            kept[position // 16, :, :, :, position % 16 :] = poison
            view.fill_(poison)
            view[table] = kept


def test_drawn_tokens_do_not_depend_on_the_batch(
    make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama()
    runner = make_runner(model_dir)
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1.5, seed=5),
        SamplingParams(temperature=2.0, top_p=0.7, seed=6),
        SamplingParams(temperature=2.0, top_k=20, min_p=0.01, seed=2**64 - 1),
    ]
    rows = [
        BatchRow(token_ids(28 + i, seed=i), 0, [[3 * i, 3 * i + 1, 3 * i + 2]], params[i % 4])
        for i in range(20)
    ]
    rows.append(BatchRow([1, 2, 3], 0, [[127]], None))
    alone = [runner.forward(Batch([row]))[0] for row in rows]
    assert runner.forward(Batch(rows)) == alone
    assert runner.forward(Batch(rows[::-1])) == alone[::-1]
    assert alone[-1] == []


@pytest.mark.parametrize("value_dim", [100, 128])
def test_a_delta_rule_whose_bits_depend_on_company_is_not_exact(
    value_dim: int, tmp_path: Path, make_runner: MakeRunner
) -> None:
    """Over more threads than there are heads torch shares columns out, and adds up a few that are
    left over in another order."""
    torch.set_num_threads(16)
    changes = {"linear_key_head_dim": 128, "linear_value_head_dim": value_dim}
    make_tiny(tmp_path, "qwen3_5_text", {**TINY_DELTAS["qwen3_5_text"]["all linear"], **changes})
    determinism = make_runner(tmp_path).determinism

    num_rows, num_heads, key_dim = 9, 2, 128
    qkv = torch.randn(num_rows, num_heads * (2 * key_dim + value_dim))
    strength, decay = torch.randn(2, num_rows, num_heads)
    gates = DeltaGates(torch.ones(num_heads), torch.zeros(num_heads))
    state = torch.zeros(num_rows + 1, num_heads, 1, 1, key_dim, value_dim)
    ways = ways_to_compute(num_rows, 1)
    together, alone = (
        [gated_delta(qkv[t], strength[t], decay[t], gates, state.clone(), 0, plan) for t, plan in w]
        for w in (ways["together"], ways["alone"])
    )
    if value_dim % 32 == 0:
        assert determinism == "exact"
    if determinism == "exact":
        assert torch.equal(torch.cat(together), torch.cat(alone))
