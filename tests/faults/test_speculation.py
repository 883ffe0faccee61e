"""Guessing in real processes: the answer is the one without it, wherever it ends and whoever dies.

One decode worker guesses by n-grams, one by a smaller model, and one does not: streams move between
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from baton.v1 import inference_service_pb2
from tests.device import ROOT
from tests.e2e.harness import Result, Stack
from tests.e2e.oracle import Ask, Oracle
from tests.faults.streams import Background
from tests.structured_output import Report, asks_of, run_batch

pytestmark = [pytest.mark.e2e, pytest.mark.exact]

DEMO = ROOT / "models" / "demo"
WORKERS = {"p0": "prefill", "d0": "decode", "d1": "decode", "d2": "decode"}
BY_MODEL = ["--speculate", "draft-model:4", "--draft-model", str(DEMO.parent / "demo-draft")]
TALE = "Once upon a time there was a little cat. The cat was happy. The cat was happy. The cat"
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.02, "seed": 12},
    {"temperature": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 0.9, "seed": 13},
]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(
        DEMO,
        tmp_path_factory.mktemp("speculation"),
        WORKERS,
        worker_flags={"d0": ["--speculate", "ngram:4"], "d2": BY_MODEL},
        flags=["--num-blocks", "256", "--token-budget", "64", "--max-num-seqs", "16"],
        worker_module="tests.guessing_worker",
    ) as stack:
        yield stack


@pytest.mark.parametrize("way", WAYS, ids=["greedy", "sampled", "penalised"])
def test_an_answer_ends_where_it_would_without(stack: Stack, way: dict[str, Any]) -> None:
    """With a text in its middle, a token, or its length, next to answers that do not guess."""
    whole = stack.generate(TALE, max_tokens=64, speculate=False, **way)
    assert len(whole.token_ids) == 64
    ends: list[dict[str, Any]] = [
        {"stops": [whole.text[60:67]]},
        {"stop_token_ids": [whole.token_ids[40]]},
        {"max_tokens": 31},
    ]

    def end_at(end: dict[str, Any]) -> None:
        options = {"max_tokens": 64, **way, **end}
        plain = stack.generate(TALE, speculate=False, **options)
        guessed = stack.generate_at_once([(TALE, options)] * 3)
        assert [shown(each) for each in guessed] == [shown(plain)] * 3

    def has_guessed(name: str) -> bool:
        counters = stack.state(name).counters
        return bool(counters.num_drafts and counters.num_accepted_tokens)

    for end in ends:
        end_at(end)
    # Whoever has most room answers: perhaps nobody yet who guesses.
    while not (has_guessed("d0") and has_guessed("d2")):
        end_at(ends[-1])
    stack.assert_idle()
    assert stack.state("d1").counters.num_drafts == 0


def test_status_tells_who_guesses(stack: Stack) -> None:
    told = {each.worker.worker_id: each.drafter for each in stack.status().workers}
    assert told == {"p0": "", "d0": "ngram:4", "d1": "", "d2": "draft-model:4 of demo-draft"}


def shown(result: Result) -> tuple[list[int], str, int]:
    return result.token_ids, result.text, result.finish_reason


def test_streams_survive_who_guesses(stack: Stack) -> None:
    oracle = Oracle(DEMO)
    tale = tokenized(stack, TALE)
    asks = [
        Ask(tale[: len(tale) - number], {"max_tokens": 120, **WAYS[number % len(WAYS)]})
        for number in range(6)
    ]
    streams = [Background(stack, ask.prompt, ignore_eos=True, **ask.sampling) for ask in asks]
    stack.wait_until(lambda: sum(stream.num_tokens for stream in streams) > 80)
    for name in ("d0", "d2"):
        stack.kill(name)
    for name in ("d0", "d2"):
        stack.restart(name)
    results = [stream.result() for stream in streams]
    assert [result.token_ids for result in results] == oracle.answers(asks)
    assert sum(result.attempts for result in results) > len(results)
    stack.assert_idle()


def tokenized(stack: Stack, text: str) -> list[int]:
    request = inference_service_pb2.TokenizeRequest(text=text, add_special_tokens=True)
    return list(stack.stub.Tokenize(request).token_ids)


def test_constrained_answers_are_valid_and_the_same_whoever_guesses_or_dies(stack: Stack) -> None:
    """Beside answers that are not constrained; forced tokens jump ahead in all of them."""
    report = Report()
    asks = asks_of(range(6), num_free=2)
    run_batch(stack, asks, report, kills_at=[10])
    assert report.is_good and report.num_cut == 0, report
    assert report.num_answers_hit and report.num_resumed
