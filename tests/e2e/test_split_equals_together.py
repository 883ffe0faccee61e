"""The same tokens, whoever computes them: separate processes, one of role `both`, a plain loop."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Stack
from tests.e2e.oracle import Ask, Oracle

pytestmark = pytest.mark.e2e

BLOCK_SIZE = 16
TOKEN_BUDGET = 64
LAYOUTS: dict[str, dict[str, str]] = {
    "one prefill": {"p0": "prefill", "d0": "decode"},
    "two prefill": {"p0": "prefill", "p1": "prefill", "d0": "decode"},
    "both": {"b0": "both"},
}
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 7},
    {"temperature": 1.5, "top_p": 0.9, "seed": 2**64 - 1},
    {"temperature": 1.2, "top_k": 20, "seed": 0},
    {"temperature": 2.0, "min_p": 0.05, "seed": 3},
    {"temperature": 3.0, "top_k": 50, "top_p": 0.8, "min_p": 0.02, "seed": 11},
    # What prompt and answer have already counts, wherever it was drawn.
    {"temperature": 0.9, "presence_penalty": 1.5, "frequency_penalty": -0.5, "seed": 12},
    {
        "repetition_penalty": 1.3,
        "logit_bias": {7: 4.5, 9: -100.0},
        "allowed_token_ids": list(range(5, 400)),
        "stop_token_ids": list(range(100, 160)),
        "min_tokens": 12,
    },
]


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda name: name.replace(" ", "_"))
def stack(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    directory = tmp_path_factory.mktemp("stack")
    # Slow steps of the one prefill worker, so that its pulls fall between them for sure.
    failpoints = {"p0": "slow_steps"} if request.param == "one prefill" else {}
    flags = ["--token-budget", str(TOKEN_BUDGET)]
    with Stack(
        tiny_model, directory, LAYOUTS[request.param], flags=flags, failpoints=failpoints
    ) as stack:
        yield stack


def prompt_of(num_tokens: int, seed: str) -> list[int]:
    """Random tokens without the end-of-sequence token; another prompt for every seed."""
    source = random.Random(f"{seed} {num_tokens}")
    return [source.randrange(3, 512) for _ in range(num_tokens)]


def mixed_asks(seed: str) -> list[Ask]:
    """Every edge of block and chunk, and every way to draw, though not every pair of them."""
    lengths = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 200]
    return [
        Ask(prompt_of(length, seed), {"max_tokens": 12 + index, **sampling})
        for index, length in enumerate(lengths)
        for sampling in (SAMPLINGS[0], SAMPLINGS[1 + index % 7])
    ]


def assert_answers(stack: Stack, asks: list[Ask], expected: list[list[int]]) -> None:
    """One after another, so that each finds what the one before it left in the caches."""
    for ask, tokens in zip(asks, expected, strict=True):
        result = stack.generate(ask.prompt, **ask.sampling)
        assert (result.token_ids, result.attempts) == (tokens, 1)


def assert_answers_at_once(stack: Stack, asks: list[Ask], expected: list[list[int]]) -> None:
    results = stack.generate_at_once([(ask.prompt, ask.sampling) for ask in asks])
    assert [result.token_ids for result in results] == expected
    assert [result.attempts for result in results] == [1] * len(asks)


@pytest.mark.parametrize(
    "stack", ["one prefill", "both"], indirect=True, ids=["one_prefill", "both"]
)
def test_one_by_one_cold_and_warm(stack: Stack, oracle: Oracle) -> None:
    # Of each length one, greedy or drawn by turns.
    asks = [ask for n, ask in enumerate(mixed_asks("one by one")) if n % 4 in (0, 3)]
    expected = oracle.answers(asks)
    assert_answers(stack, asks, expected)
    assert_answers(stack, asks, expected)
    warm = stack.generate(asks[-1].prompt, max_tokens=1)
    assert warm.finished.usage.num_cached_tokens == 192
    stack.assert_idle()


def test_all_at_once_cold_and_warm(stack: Stack, oracle: Oracle) -> None:
    asks = mixed_asks("at once")
    expected = oracle.answers(asks)
    assert_answers_at_once(stack, asks, expected)
    assert_answers_at_once(stack, asks, expected)
    stack.assert_idle()


@pytest.mark.exact
def test_answers_do_not_depend_on_company(stack: Stack, oracle: Oracle) -> None:
    """`exact`: alone, amid 15 others, and in the plain loop with the same others."""
    ask = Ask(prompt_of(150, "company"), {"temperature": 2.0, "seed": 5, "max_tokens": 40})
    others = [
        Ask(prompt_of(10 * n + 1, "others"), {"temperature": n / 5, "seed": n, "max_tokens": 40})
        for n in range(1, 16)
    ]
    asks = [*others[:7], ask, *others[7:]]
    alone = stack.generate(ask.prompt, **ask.sampling).token_ids
    amid = stack.generate_at_once([(each.prompt, each.sampling) for each in asks])
    in_loop = oracle.answers_of_batch(asks)
    assert len(set(alone)) > 10
    assert amid[7].token_ids == alone
    assert [result.token_ids for result in amid] == in_loop
    stack.assert_idle()


@pytest.mark.exact
def test_logprobs_whoever_computes_them(stack: Stack, oracle: Oracle) -> None:
    """Cold, with all of the prompt in the caches, and in company: bit for bit."""
    sampling = {"temperature": 1.5, "seed": 3, "max_tokens": 9, "logprobs": 3, "prompt_logprobs": 2}
    ask = Ask(prompt_of(150, "logprobs"), sampling)
    of_prompt, of_answer = oracle.told(ask)
    others = [Ask(prompt_of(30 * n, "beside"), {"max_tokens": 9, "logprobs": 20}) for n in (1, 2)]
    cold = stack.generate(ask.prompt, **ask.sampling)
    warm = stack.generate(ask.prompt, **ask.sampling)
    asks = [*others, ask]
    *_, amid = stack.generate_at_once([(each.prompt, each.sampling) for each in asks])
    for result in (cold, warm, amid):
        assert (result.prompt_logprobs, result.logprobs) == (of_prompt, of_answer)
        assert result.finished.usage.num_cached_tokens == 0
    assert all(len(each.top_token_ids) == 3 for each in cold.logprobs)
    alone = stack.generate(ask.prompt, max_tokens=0, prompt_logprobs=2)
    assert (alone.prompt_logprobs, alone.token_ids) == (of_prompt, [])
    assert stack.generate(ask.prompt, max_tokens=2).logprobs == []
    stack.assert_idle()


def test_continued_prompt_uses_blocks_that_decode_wrote(stack: Stack, oracle: Oracle) -> None:
    first = Ask(prompt_of(100, "continued"), {"temperature": 1.0, "seed": 1, "max_tokens": 30})
    answer = stack.generate(first.prompt, **first.sampling).token_ids
    assert answer == oracle.answer(first)
    second = Ask([*first.prompt, *answer, *prompt_of(6, "turn")], {"max_tokens": 30})
    result = stack.generate(second.prompt, **second.sampling)
    assert result.token_ids == oracle.answer(second)
    # Of 136 tokens 129 were computed before: 8 blocks, the last two filled by decode steps.
    if "d0" in stack.processes:
        assert places_pulled(stack, result.request_id) == [8]
    else:
        assert result.finished.usage.num_cached_tokens == 128
    stack.assert_idle()


@pytest.mark.parametrize("stack", ["two prefill"], indirect=True, ids=["two_prefill"])
def test_two_prefill_workers_share_the_load(stack: Stack) -> None:
    asks = [prompt_of(100, f"load {index}") for index in range(8)]
    results = stack.generate_at_once([(prompt, {"max_tokens": 2}) for prompt in asks])
    assert {result.finished.prefill_worker_id for result in results} == {"p0", "p1"}


@pytest.mark.parametrize("stack", ["one prefill"], indirect=True, ids=["one_prefill"])
def test_blocks_are_pulled_while_later_chunks_compute(stack: Stack, oracle: Oracle) -> None:
    ask = Ask(prompt_of(6 * TOKEN_BUDGET + 5, "overlap"), {"max_tokens": 4})
    result = stack.generate(ask.prompt, **ask.sampling)
    assert result.token_ids == oracle.answer(ask)
    chunks = events_of(stack, "p0", result.request_id, "chunk")
    pulls = events_of(stack, "d0", result.request_id, "pulled")
    assert [chunk["is_last"] for chunk in chunks] == [False] * 6 + [True]
    early = [pull for pull in pulls if pull["finished"] < chunks[-1]["started"]]
    assert early
    pulled_early = {index for pull in early for _, index in pull["places"]}
    # What the last chunk computed can't be among it; what the first ones computed must be.
    assert set(range(4 * TOKEN_BUDGET // BLOCK_SIZE)) <= pulled_early
    assert max(pulled_early) < 6 * TOKEN_BUDGET // BLOCK_SIZE


@pytest.mark.parametrize("stack", ["one prefill"], indirect=True, ids=["one_prefill"])
def test_blocks_held_by_the_reader_are_not_pulled(stack: Stack, oracle: Oracle) -> None:
    prompt = prompt_of(200, "held")
    first = stack.generate(prompt, max_tokens=4)
    again = stack.generate(prompt, max_tokens=4)
    branched = Ask([*prompt[:150], *prompt_of(60, "branch")], {"max_tokens": 4})
    other = stack.generate(branched.prompt, **branched.sampling)
    assert first.token_ids == again.token_ids
    assert other.token_ids == oracle.answer(branched)
    assert places_pulled(stack, first.request_id) == list(range(13))
    assert places_pulled(stack, again.request_id) == [12], "the tail, which nobody shares"
    assert places_pulled(stack, other.request_id) == list(range(9, 14))
    assert again.finished.usage.num_cached_tokens == 192
    assert other.finished.usage.num_cached_tokens == 144


def events_of(stack: Stack, worker: str, request_id: str, event: str) -> list[dict[str, Any]]:
    """In order of time."""
    return [
        each
        for each in stack.trace(worker)
        if each["event"] == event and str(each["key"]).startswith(f"{request_id}/")
    ]


def places_pulled(stack: Stack, request_id: str) -> list[int]:
    """Indices in the block table, in order; each at most once."""
    pulls = events_of(stack, "d0", request_id, "pulled")
    return sorted(index for pull in pulls for _, index in pull["places"])
