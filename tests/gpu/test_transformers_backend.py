"""Models that run through transformers on a GPU: their tokens are those of transformers itself on a
CPU, in chunks, beside others, and over blocks that another engine has computed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.sampling import SamplingParams
from tests.gpu.conftest import MakeRunner
from tests.unit.engine.tiny_foreign import TINY_FOREIGN
from tests.unit.engine.tiny_models import make_tiny

pytestmark = pytest.mark.gpu

LENGTHS = (1, 17, 64, 150)
NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
Fields = dict[str, Any]
MODELS: dict[str, Fields] = {
    **{model_type: next(iter(cases.values())) for model_type, cases in TINY_FOREIGN.items()},
    # Sinks and experts; a file of its own is not taken.
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 21,
    },
}


def prompts(vocab_size: int) -> list[list[int]]:
    return [random.Random(n).choices(range(vocab_size), k=n) for n in LENGTHS]


def start(make: MakeRunner, model_dir: Path, dtype: str) -> ModelRunner:
    return make(model_dir, dtype=dtype, model_impl="transformers")


@pytest.mark.parametrize("model_type", MODELS)
def test_float32_tokens_are_those_of_transformers_split_and_together(
    model_type: str, tmp_path: Path, make_gpu_runner: MakeRunner
) -> None:
    model = make_tiny(tmp_path, model_type, MODELS[model_type])
    runner = start(make_gpu_runner, tmp_path, "float32")
    assert runner.determinism == "consistent"
    assert runner.model_impl.endswith(" (eager steps)")
    asked = prompts(runner.model_config.vocab_size)
    together = PlainLoop(runner).generate(asked, [GREEDY] * len(asked), chunk=50)
    for prompt, answer in zip(asked, together, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    assert [PlainLoop(runner).generate([each], [GREEDY])[0] for each in asked] == together
    # A hand-off moves bytes.
    reader = start(make_gpu_runner, tmp_path, "float32")
    assert split(runner, reader, asked[-1]) == together[-1]


def split(prefill: ModelRunner, decode: ModelRunner, prompt: list[int]) -> list[int]:
    tables = [list(range(12 * group, 12 * group + 12)) for group in range(len(prefill.groups))]
    [[first]] = prefill.forward(Batch([BatchRow(prompt, 0, tables, GREEDY)]))
    decode.kv_cache.memory.copy_(prefill.kv_cache.memory)
    answer = [first.token_id]
    while len(answer) < NUM_TOKENS:
        position = len(prompt) + len(answer) - 1
        [[drawn]] = decode.forward(Batch([BatchRow(answer[-1:], position, tables, GREEDY)]))
        answer.append(drawn.token_id)
    return answer


@pytest.mark.parametrize("model_type", ["olmo3", "gpt_oss"])
def test_bfloat16_passes_what_is_compared_at_start(
    model_type: str, tmp_path: Path, make_gpu_runner: MakeRunner
) -> None:
    make_tiny(tmp_path, model_type, MODELS[model_type], is_calm=True)
    runner = start(make_gpu_runner, tmp_path, "bfloat16")
    asked = prompts(runner.model_config.vocab_size)
    answers = PlainLoop(runner).generate(asked, [GREEDY] * len(asked), chunk=50)
    assert [len(each) for each in answers] == [NUM_TOKENS] * len(asked)


def test_made_up_weights_are_made_on_the_gpu(tmp_path: Path, make_gpu_runner: MakeRunner) -> None:
    make_tiny(tmp_path, "olmo2", {})
    runner = make_gpu_runner(tmp_path, load_format="dummy", model_impl="transformers")
    row = BatchRow([5, 6, 7], 0, [[0]])
    assert bool(runner.logits(Batch([row])).isfinite().all())
