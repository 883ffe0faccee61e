"""Steps in captured graphs, many rows at a time, against steps that are launched kernel by kernel,
one row at a time: in float32 they draw the same tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

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
