"""Every model type against transformers, and against itself: float32 logits, greedy tokens, and the
class `exact`, over random tiny models (tiny_models.py).

transformers is asked once for each answer: where its choice behind every prefix of ours is the
token that we have next, its own answer is ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.sampling import SamplingParams
from tests.device import ENGINE, ON_GPU
from tests.unit.engine.tiny_models import CASES, TINY_MODELS, WINDOW, make_tiny

CHUNK = 48
# Around a block, a window, a chunk.
LENGTHS = (1, 15, 16, 17, WINDOW - 1, WINDOW, WINDOW + 1, CHUNK - 1, CHUNK, CHUNK + 1)
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


def prompt_of(length: int, vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()


def transformers_logits(model: Any, sequences: list[list[int]]) -> Tensor:
    """[sequences, positions, vocab]; what stands behind a sequence does not reach back."""
    longest = max(len(each) for each in sequences)
    padded = [each + [0] * (longest - len(each)) for each in sequences]
    with torch.no_grad():
        logits: Tensor = model(torch.tensor(padded)).logits
    return logits


@pytest.mark.exact
@pytest.mark.parametrize(("model_type", "case"), CASES, ids=str)
def test_a_type(
    model_type: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny(tmp_path, model_type, TINY_MODELS[model_type][case])
    runner = ModelRunner(EngineConfig(tmp_path, num_blocks=128, **ENGINE))
    vocab_size = runner.model_config.vocab_size
    prompts = [prompt_of(length, vocab_size) for length in LENGTHS]
    answers = PlainLoop(runner).generate(prompts, [GREEDY] * len(prompts), chunk=CHUNK)

    whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    expected = transformers_logits(model, whole)
    for prompt, answer, logits in zip(prompts, answers, expected, strict=True):
        [got] = runner.logits(Batch([BatchRow(prompt, 0, _tables(runner))])).cpu()
        own = logits[len(prompt) - 1]
        assert own.max() - own.min() > 10
        limit = 1e-3 * float(own.abs().max()) if ON_GPU else 1e-4
        torch.testing.assert_close(got, own, atol=limit, rtol=0)
        assert logits[len(prompt) - 1 :].argmax(-1)[: len(answer)].tolist() == answer


def _tables(runner: ModelRunner) -> list[list[int]]:
    """By cache group, blocks for 128 tokens that no other group has."""
    return [list(range(8 * index, 8 * index + 8)) for index in range(len(runner.groups))]
