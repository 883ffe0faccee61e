"""Logits on the GPU against the float32 reference on the CPU, as max |error| / max |logit|."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.model_runner import ModelRunner
from tests.gpu.conftest import DEMO, MakeRunner, text_of

pytestmark = pytest.mark.gpu

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
SHAPES: dict[str, dict[str, Any]] = {
    "24-grouped": {"head_dim": 24, "num_attention_heads": 8, "num_key_value_heads": 4},
    "32-each-its-own": {"head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 8},
    "40-one-kv-head": {"head_dim": 40, "num_attention_heads": 8, "num_key_value_heads": 1},
    "64-grouped-biases": {
        "head_dim": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "80-three-to-one": {
        "head_dim": 80,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "hidden_size": 240,
    },
    "96-tied": {"head_dim": 96, "tie_word_embeddings": True},
    "128-grouped": {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 1},
    "128-odd-sizes": {"head_dim": 128, "vocab_size": 507, "intermediate_size": 301},
}
SIZES = {"hidden_size": 256, "intermediate_size": 352, "vocab_size": 512}
TABLES = {1: [9, 40], 17: [3, 77, 12], 200: [*range(100, 113), 5]}
"""Block tables by the length of the prompt, with room for what is decoded."""
_OTHER = [60, 61, 62, 63]
"""Of one more prompt."""


PromptOf = Callable[[int], list[int]]
"""Given a number of tokens."""


def random_tokens(vocab_size: int) -> PromptOf:
    return lambda num_tokens: random.Random(num_tokens).choices(range(vocab_size), k=num_tokens)


def tokens_of_text() -> PromptOf:
    """What the demo model was trained for: of other tokens it knows nothing."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    return lambda num_tokens: list(tokenizer.encode(text_of(num_tokens)).ids[:num_tokens])


TablesOf = Callable[[list[int]], list[list[int]]]
"""The block tables of a row, by cache group, of a model that has one such as given."""


def of_one_group(table: list[int]) -> list[list[int]]:
    return [table]


def of_groups(*runners: ModelRunner) -> TablesOf:
    """Blocks that all of them have, each group others: groups may share a pool. Of a group of
    states a slot, each row another."""
    tables = [*TABLES.values(), _OTHER]
    taken = sorted({block for table in tables for block in table})
    groups = runners[0].groups
    num_growing = sum(group.spec.grows for group in groups)
    num_blocks = min(
        (
            num
            for runner in runners
            for pool, num in enumerate(runner.num_blocks)
            if pool not in runner.arrangement.slot_pools
        ),
        default=0,
    )
    drawn = random.Random(1).sample(range(num_blocks), num_growing * len(taken))

    def tables_of(table: list[int]) -> list[list[int]]:
        places = [taken.index(block) for block in table]
        return [
            [drawn[group::num_growing][place] for place in places]
            if each.spec.grows
            else [tables.index(table)]
            for group, each in enumerate(groups)
        ]

    return tables_of


def steps_of(prompt_of: PromptOf, tables_of: TablesOf = of_one_group) -> list[list[BatchRow]]:
    """Whole prompts, chunks over cached prefixes, decode rows, and all of these in one step."""
    tables = {length: tables_of(table) for length, table in TABLES.items()}
    other_tables = tables_of(_OTHER)
    prompts = {length: prompt_of(length) for length in TABLES}
    following = [prompt_of(length)[:5] for length in (5, 6, 7)]
    long, other = prompts[200], prompt_of(61)
    whole = [[BatchRow(prompt, 0, tables[length])] for length, prompt in prompts.items()]
    decode = [
        [
            BatchRow(tokens[at : at + 1], length + at, table)
            for tokens, (length, table) in zip(following, tables.items(), strict=True)
        ]
        for at in range(3)
    ]
    chunks = [[BatchRow(long[a:b], a, tables[200])] for a, b in ((0, 64), (64, 81), (81, 200))]
    mixed = [
        BatchRow(other[:45], 0, other_tables),
        BatchRow(following[0][3:4], 4, tables[1]),
        BatchRow(long[150:], 150, tables[200]),
        BatchRow(following[1][3:4], 20, tables[17]),
    ]
    rest = [BatchRow(other[45:], 45, other_tables), decode[2][0]]
    return [*whole, *decode, *chunks, mixed, rest]


def compare(
    runner: ModelRunner,
    reference: ModelRunner,
    prompt_of: PromptOf,
    limit: float,
    tables_of: TablesOf = of_one_group,
) -> float:
    """The largest error of all steps."""
    errors = []
    for number, rows in enumerate(steps_of(prompt_of, tables_of)):
        expected = reference.logits(Batch(rows))
        actual = runner.logits(Batch(rows)).cpu()
        error = float((actual - expected).abs().max() / expected.abs().max())
        assert error <= limit, f"step {number}: {error:.2g}"
        errors.append(error)
    return max(errors)


@pytest.fixture(autouse=True)
def tensor_float_32_is_off() -> None:
    """What float32 is worth: nothing in this process has switched it on."""
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_random_llama(
    shape: str,
    dtype: str,
    make_llama: Callable[..., tuple[Path, Any]],
    make_gpu_runner: MakeRunner,
    make_reference: MakeRunner,
    record_property: Callable[[str, object], None],
) -> None:
    # Weights that let no rounding grow: attention looks at many tokens.
    model_dir, _ = make_llama(std=0.03, **{**SIZES, **SHAPES[shape]})
    runner = make_gpu_runner(model_dir, dtype=dtype)
    reference = make_reference(model_dir)
    prompt_of = random_tokens(reference.model_config.vocab_size)
    record_property("error", compare(runner, reference, prompt_of, TOLERANCE[dtype]))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_the_demo_model(
    block_size: int,
    dtype: str,
    make_gpu_runner: MakeRunner,
    make_reference: MakeRunner,
    record_property: Callable[[str, object], None],
) -> None:
    """In blocks of other sizes the tables are longer than they need be."""
    runner = make_gpu_runner(DEMO, dtype=dtype, block_size=block_size)
    reference = make_reference(DEMO)
    record_property("error", compare(runner, reference, tokens_of_text(), TOLERANCE[dtype]))
