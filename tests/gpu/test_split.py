"""Split over two workers, or together in one: the same greedy tokens, over `nixl` between GPUs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from baton.v1 import types_pb2
from tests.e2e.harness import Stack
from tests.gpu.conftest import DEMO, text_of
from tests.unit.engine.tiny_models import SIZES, TINY_MODELS, WINDOW, make_tiny

pytestmark = [pytest.mark.gpu, pytest.mark.e2e, pytest.mark.nixl]

# A place is a GPU for each worker. Where there is one GPU, there is one place.
PLACES = {"one GPU": ("0", "0")}
if torch.cuda.device_count() > 1:
    PLACES["two GPUs"] = ("0", "1")
NUM_TOKENS = 64
PROMPTS = [text_of(num_words) for num_words in (3, 8, 13, 21, 34, 55, 89, 144, 233, 300, 5, 30)]
TYPES = {
    "windows": ("mistral", "windowed"),
    "unequal groups": ("gemma4_text", "keys are values"),
    "caches shared, experts": ("gemma4_text", "experts, caches shared"),
    "mixture": ("qwen3_moe", "as they come"),
    "mixture, windows, sinks": ("gpt_oss", "as they come"),
    "latents": ("deepseek_v2", "as lite"),
    "states, experts": ("qwen3_next", "as they come"),
    "states, uneven heads": ("qwen3_5_text", "uneven heads, tied"),
    "states of a text part": ("qwen3_5_moe", "untied"),
    "states alone": ("mamba2", "groups, biases, tied"),
    "states beside attention": ("falcon_h1", "every multiplier"),
}
"""Type and case of tiny_models.py; they have no tokenizer."""


def answers(stack: Stack) -> list[list[int]]:
    """Each prompt alone, one after another."""
    results = [stack.generate(prompt, max_tokens=NUM_TOKENS) for prompt in PROMPTS]
    assert [result.attempts for result in results] == [1] * len(results)
    assert [len(result.token_ids) for result in results] == [NUM_TOKENS] * len(results)
    return [result.token_ids for result in results]


def answers_at_once(stack: Stack) -> list[list[int]]:
    """All prompts, other ones, together."""
    asks = [(f"Then {prompt}", {"max_tokens": NUM_TOKENS}) for prompt in PROMPTS]
    return [result.token_ids for result in stack.generate_at_once(asks)]


def answers_to_tokens(stack: Stack) -> list[list[int]]:
    """Of lengths around blocks and windows; each prompt alone, then other ones together."""
    lengths = (1, 15, 16, 17, WINDOW - 1, WINDOW, WINDOW + 1, 64, 150, 290)

    def prompt(length: int, seed: int) -> list[int]:
        return random.Random(1000 * seed + length).choices(range(SIZES["vocab_size"]), k=length)

    options = {"max_tokens": NUM_TOKENS}
    results = [stack.generate(prompt(length, 0), max_tokens=NUM_TOKENS) for length in lengths]
    # Another turn each, which begins with what is cached.
    turns = [
        prompt(length, 0) + result.token_ids + [3, 5, 7]
        for length, result in zip(lengths, results, strict=True)
    ]
    results += [stack.generate(turn, max_tokens=NUM_TOKENS // 4) for turn in turns]
    results += stack.generate_at_once([(prompt(length, 1), options) for length in lengths])
    assert [result.attempts for result in results] == [1] * len(results)
    return [result.token_ids for result in results]


def answers_from_states(stack: Stack) -> list[list[int]]:
    """The same, of a model that keeps states: further turns begin with one that was kept."""
    results = answers_to_tokens(stack)
    roles = {each.worker.worker_id: each.role for each in stack.status().workers}
    [name] = [name for name, role in roles.items() if role != types_pb2.WORKER_ROLE_DECODE]
    counters = stack.state(name).counters
    assert counters.num_kept_states > 0 and counters.num_digest_mismatches == 0
    assert counters.num_restored_states >= 6 and counters.num_cached_prompt_tokens > 500
    return results


def split_and_together(
    directory: Path,
    dtype: str,
    place: str,
    ask: Callable[[Stack], list[list[int]]],
    model: Path = DEMO,
) -> tuple[list[list[int]], list[list[int]]]:
    """The answers of a prefill and a decode worker, and those of one worker of role `both`."""
    flags = ["--dtype", dtype, "--transport", "nixl"]
    gpus = dict(zip(("p0", "d0"), PLACES[place], strict=True))
    environments = {name: {"CUDA_VISIBLE_DEVICES": gpu} for name, gpu in gpus.items()}
    roles = {"p0": "prefill", "d0": "decode"}
    with Stack(model, directory / "split", roles, flags=flags, environments=environments) as stack:
        split = ask(stack)
        assert stack.state("d0").counters.num_pulled_blocks >= len(split)
        assert stack.state("d0").counters.num_computed_prompt_tokens == 0
        stack.assert_idle()
    with Stack(model, directory / "together", {"b0": "both"}, flags=flags) as stack:
        together = ask(stack)
        stack.assert_idle()
    return split, together


@pytest.mark.parametrize("ask", [answers, answers_at_once])
@pytest.mark.parametrize("place", PLACES)
def test_float32_gives_the_same_tokens(
    place: str, ask: Callable[[Stack], list[list[int]]], tmp_path: Path
) -> None:
    split, together = split_and_together(tmp_path, "float32", place, ask)
    assert split == together


@pytest.mark.parametrize("name", TYPES)
def test_types_give_the_same_tokens(name: str, tmp_path: Path) -> None:
    model_type, case = TYPES[name]
    make_tiny(tmp_path / "model", model_type, TINY_MODELS[model_type][case])
    ask = answers_from_states if name.startswith("states") else answers_to_tokens
    split, together = split_and_together(tmp_path, "float32", "one GPU", ask, tmp_path / "model")
    assert split == together


@pytest.mark.parametrize("ask", [answers, answers_at_once])
@pytest.mark.parametrize("place", PLACES)
def test_bfloat16_tells_how_many_tokens_are_the_same(
    place: str,
    ask: Callable[[Stack], list[list[int]]],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Up to the first that differs, after which two answers have nothing to do with each other."""
    split, together = split_and_together(tmp_path, "bfloat16", place, ask)
    num_equal = sum(_num_equal(a, b) for a, b in zip(split, together, strict=True))
    share = num_equal / sum(map(len, together))
    record_property("share_of_equal_tokens", share)
    with capsys.disabled():
        text = f"\nbfloat16, {place}, {ask.__name__}: {share:.1%} of the greedy tokens are the same"
        print(text)  # noqa: T201


def _num_equal(ours: list[int], theirs: list[int]) -> int:
    """Tokens before the first that differs."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((place for place, (a, b) in pairs if a != b), len(ours))
