"""A model that runs through transformers, over the Triton kernels: windows, sinks and experts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.shaping import KnownTokens
from baton.shared.engine.transformers_backend import start_check
from baton.shared.sampling import SamplingParams
from tests.unit.engine.tiny_models import make_tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning"),
]

WINDOW = 9
FIELDS: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": WINDOW,
    "max_position_embeddings": 128,
}
GREEDY = SamplingParams(temperature=0.0)
TOKENS = random.Random(4).choices(range(96), k=30)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def short_check() -> Iterator[None]:
    """The interpreter takes its time: what is compared at start is as short as shows all ways."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start_check, "_LENGTHS", (12, 3, 2))
        steps = (((0, 0, 6), (1, 0, 2)), ((1, 2, 3), (0, 6, 12)))
        patch.setattr(start_check, "_STEPS", steps)
        yield


def start(model_dir: Path) -> ModelRunner:
    return ModelRunner(
        EngineConfig(
            model_dir,
            device="cuda" if torch.cuda.is_available() else "cpu",
            dtype="float32",
            kernels="triton",
            model_impl="transformers",
            num_blocks=40,
            max_num_seqs=2,
            token_budget=32,
        )
    )


@pytest.fixture(scope="module")
def model_and_runner(
    tmp_path_factory: pytest.TempPathFactory, one_thread: None, short_check: None
) -> tuple[Any, ModelRunner]:
    directory = tmp_path_factory.mktemp("gpt_oss")
    model = make_tiny(directory, "gpt_oss", FIELDS)
    return model, start(directory)


def tables(runner: ModelRunner, first: int = 0) -> list[list[int]]:
    return [list(range(first + 4 * group, first + 4 * group + 4)) for group in range(2)]


def expected(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]  # type: ignore[no-any-return]


def test_steps_are_those_of_transformers(model_and_runner: tuple[Any, ModelRunner]) -> None:
    model, runner = model_and_runner
    assert (runner.kernels, runner.determinism) == ("triton", "consistent")
    want = expected(model, TOKENS)
    runner.forward(Batch([BatchRow(TOKENS[:13], 0, tables(runner))]))
    beside = BatchRow(TOKENS[:5], 0, tables(runner, 8), GREEDY)
    got = runner.logits(Batch([beside, BatchRow(TOKENS[13:29], 13, tables(runner))]))
    torch.testing.assert_close(got.cpu(), want[[4, 28]], atol=2e-4, rtol=0)
    # What the model gives are logits already, which are changed where they lie: logprobs are of
    # those that nothing has changed.
    last = want[29]
    likeliest = int(last.argmax())
    biased = SamplingParams(temperature=0.0, logprobs=1, logit_bias=((likeliest, -90.0),))
    rows = [
        BatchRow(TOKENS[5:6], 5, tables(runner, 8), GREEDY),
        BatchRow(TOKENS[29:], 29, tables(runner), biased, history=KnownTokens(TOKENS, 30)),
    ]
    [[plain], [drawn]] = runner.forward(Batch(rows))
    assert plain.token_id == int(want[5].argmax())
    assert drawn.token_id == int(last.topk(2).indices[1])
    assert drawn.logprobs is not None
    assert drawn.logprobs.top_token_ids == (likeliest,)
    [logprob] = drawn.logprobs.top_logprobs
    assert logprob == pytest.approx(float(last.log_softmax(-1)[likeliest]), abs=1e-3)
