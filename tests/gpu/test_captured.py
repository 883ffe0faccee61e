"""Steps in captured graphs, many rows at a time, against steps that are launched kernel by kernel,
one row at a time: in float32 they draw the same tokens."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.sampling import SamplingParams
from tests.gpu.conftest import MakeRunner
from tests.unit.engine.tiny_models import SIZES, TINY_MODELS, make_tiny

pytestmark = pytest.mark.gpu

CASES = [
    ("llama", "grouped"),
    ("mistral", "windowed"),
    ("gemma3_text", "five to one"),
    ("gemma4_text", "experts, caches shared"),
    ("qwen3_moe", "as they come"),
    ("gpt_oss", "as they come"),
    ("deepseek_v2", "as lite"),
    ("qwen3_next", "as they come"),
    ("falcon_h1", "every multiplier"),
]
LENGTHS = (1, 15, 16, 17, 30, 64, 150)
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=50, max_tokens=32, ignore_eos=True, seed=5),
    SamplingParams(
        temperature=1.0,
        presence_penalty=1.0,
        repetition_penalty=1.2,
        max_tokens=32,
        ignore_eos=True,
        seed=6,
    ),
]


@pytest.mark.parametrize(("model_type", "case"), CASES)
def test_tokens_are_the_same(
    model_type: str, case: str, tmp_path: Path, make_gpu_runner: MakeRunner
) -> None:
    make_tiny(tmp_path, model_type, TINY_MODELS[model_type][case])
    prompts = [random.Random(n).choices(range(SIZES["vocab_size"]), k=n) for n in LENGTHS]
    params = [PARAMS[number % len(PARAMS)] for number in range(len(prompts))]
    captured, launched = (
        PlainLoop(make_gpu_runner(tmp_path, dtype="float32", cuda_graphs=graphs))
        for graphs in (True, False)
    )
    together = captured.generate(prompts, params, chunk=48)
    alone = [
        launched.generate([prompt], [each], chunk=512)[0]
        for prompt, each in zip(prompts, params, strict=True)
    ]
    assert together == alone


def test_masks_that_come_while_a_captured_step_computes(
    tmp_path: Path, make_gpu_runner: MakeRunner
) -> None:
    """Batches of all sizes in turn: the graphs of forward pass and draw share memory with those of
    the others."""
    make_tiny(tmp_path, "llama", TINY_MODELS["llama"]["grouped"])
    captured, launched = (
        make_gpu_runner(tmp_path, dtype="float32", cuda_graphs=graphs) for graphs in (True, False)
    )
    source = random.Random(8)
    vocab_size, block_size = SIZES["vocab_size"], captured.kv_cache.block_size
    answers = [source.choices(range(vocab_size), k=length) for length in LENGTHS]
    first = 0
    tables = []
    for number, prompt in enumerate(answers):
        num_blocks = -(-(len(prompt) + 32) // block_size)
        tables.append([list(range(first, first + num_blocks))])
        first += num_blocks
        row = BatchRow(prompt, 0, tables[number], PARAMS[0])
        [[token]] = captured.forward(Batch([row]))
        assert launched.forward(Batch([row])) == [[token]]
        prompt.append(token.token_id)
    for step in range(20):
        taking = source.sample(range(len(answers)), 1 + step % len(answers))
        masks = {
            place: np.array([source.choices(range(2**32), k=-(-vocab_size // 32))], np.uint32)
            for place in range(0, len(taking), 2)
        }
        rows = [
            BatchRow(answers[i][-1:], len(answers[i]) - 1, tables[i], PARAMS[i % 2]) for i in taking
        ]
        begun = captured.begin(Batch(rows))
        captured.check_device()
        drawn = begun.draw(masks).result()
        for place, row in enumerate(rows):
            row.masks = masks.get(place)
        assert drawn == launched.forward(Batch(rows))
        for i, [token] in zip(taking, drawn, strict=True):
            answers[i].append(token.token_id)
