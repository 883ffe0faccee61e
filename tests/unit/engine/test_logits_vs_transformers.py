"""The engine against transformers: logits within 1e-4 (1e-3 of the largest on a GPU), the same
greedy tokens. Model types and their configs are in test_model_types.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.sampling import SamplingParams
from tests.device import ON_GPU
from tests.unit.engine.conftest import MakeLlama, MakeRunner

GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
DEMO = Path(__file__).parents[3] / "models" / "demo"


def expected_tokens(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    with torch.no_grad():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return [int(token) for token in output[0, len(prompt) :]]


def random_prompt(length: int, vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return [int(t) for t in torch.randint(vocab_size, (length,), generator=generator)]


def random_prompts(vocab_size: int) -> list[list[int]]:
    return [random_prompt(length, vocab_size) for length in (1, 15, 16, 17, 200)]


def block_tables(runner: ModelRunner) -> list[list[int]]:
    """By cache group, blocks for 256 tokens that no other group has."""
    starts = [16 * index for index in range(len(runner.groups))]
    return [list(range(start, start + 16)) for start in starts]


def check_logits(model: Any, runner: ModelRunner, min_span: float) -> None:
    for prompt in random_prompts(runner.model_config.vocab_size):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0, -1]
        got = runner.logits(Batch([BatchRow(prompt, 0, block_tables(runner))]))[0].cpu()
        assert float(expected.max() - expected.min()) > min_span
        limit = 1e-3 * float(expected.abs().max()) if ON_GPU else 1e-4
        torch.testing.assert_close(got, expected, atol=limit, rtol=0)


def check_tokens(model: Any, runner: ModelRunner) -> None:
    prompts = random_prompts(runner.model_config.vocab_size)
    one_by_one = [expected_tokens(model, prompt, 64) for prompt in prompts]
    loop = PlainLoop(runner)
    assert loop.generate(prompts, [GREEDY] * len(prompts), chunk=48) == one_by_one
    assert [loop.generate([prompt], [GREEDY], chunk=512)[0] for prompt in prompts] == one_by_one


def test_the_demo_model(make_runner: MakeRunner) -> None:
    check_logits(demo_model(), make_runner(DEMO), min_span=0)


@pytest.mark.exact
def test_greedy_tokens_of_the_demo_model(make_runner: MakeRunner) -> None:
    check_tokens(demo_model(), make_runner(DEMO))


def demo_model() -> Any:
    model: Any = LlamaForCausalLM.from_pretrained(
        DEMO, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def test_sharded_weights_give_the_same_model(
    make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama()
    sharded_dir, _ = make_llama(max_shard_size="100KB")
    assert len(list(sharded_dir.glob("*.safetensors"))) > 1
    row = BatchRow(random_prompt(40, 320), 0, [[0, 1, 2]])
    assert torch.equal(
        make_runner(model_dir).logits(Batch([row])), make_runner(sharded_dir).logits(Batch([row]))
    )


def test_bfloat16_is_near(make_llama: MakeLlama, make_runner: MakeRunner) -> None:
    """The reference computes in float32 with the same weights, bfloat16 numbers: one that rounded
    as well would be as far from the truth as the engine, and the two further from each other."""
    model_dir, model = make_llama(std=0.07)
    runner = make_runner(model_dir, dtype="bfloat16")
    assert runner.determinism == "consistent"
    model = model.to(torch.bfloat16).float()
    for length in (1, 17, 150):
        prompt = random_prompt(length, 320)
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0, -1]
        got = runner.logits(Batch([BatchRow(prompt, 0, [list(range(10))])]))[0].cpu()
        limit = 2e-2 * float(expected.abs().max())
        torch.testing.assert_close(got, expected, atol=limit, rtol=0)
