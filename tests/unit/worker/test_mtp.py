"""A layer of the model's own checkpoint guesses: answers are the answers without, in the class
`exact`, whoever computed the prompt, and whatever became of the worker."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.speculation import MTP
from tests.unit.worker.conftest import MakeRunner
from tests.unit.worker.drafting import GuessingRunner
from tests.unit.worker.late_runner import LateRunner
from tests.unit.worker.network import Clock
from tests.unit.worker.simulation import Cluster
from tests.unit.worker.test_model_drafter import clock, submit_all
from tests.unit.worker.test_speculation import COPYING, PARAMS, PLAIN, Answers, OneWorker

__all__ = ["clock"]
KINDS = ("layer ahead", "layer ahead, states")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def answers(make_runner: MakeRunner, kind: str) -> Answers:
    return Answers(make_runner(64, kind))


@pytest.fixture
def make_guessing(make_runner: MakeRunner, kind: str) -> Callable[..., Any]:
    model_dir = make_runner(8, kind)._config.model_dir

    def make(num_blocks: int, num_drafts: int = 5) -> Any:
        how = {"num_drafts": num_drafts, "draft_model_dir": model_dir, "draft_kind": MTP}
        return GuessingRunner(make_runner(num_blocks, kind, **how))

    return make


def test_mixed_batches_in_every_way_of_drawing(
    make_runner: MakeRunner,
    make_guessing: Callable[..., Any],
    answers: Answers,
    clock: Clock,
    kind: str,
) -> None:
    """Where steps are launched ahead, and blocks are too few."""
    decode = make_guessing(16)
    decode._runner = LateRunner(decode._runner)
    cluster = Cluster({"prefill": make_runner(16, kind), "decode": decode}, clock)
    requests = submit_all(cluster, answers, PARAMS if kind == "layer ahead" else PARAMS[1:])
    cluster.settle()
    assert [request.token_ids for request in requests] == [each.expected for each in requests]
    counters = cluster.network.workers["decode"].counters
    assert counters["accepted_tokens"] > counters["drafts"] / 8 > 10
    assert counters["preemptions"] > 0
    decode.check()


@pytest.mark.parametrize("num_rounds", [5, 6])
def test_a_decode_worker_that_dies_after_so_many_rounds(
    make_runner: MakeRunner,
    make_guessing: Callable[..., Any],
    answers: Answers,
    clock: Clock,
    num_rounds: int,
    kind: str,
) -> None:
    """Another takes over that guesses, or one that does not."""
    runners = {"prefill": make_runner(64, kind), "decode": make_guessing(64)}
    cluster = Cluster(runners, clock)
    network, params = cluster.network, PARAMS[num_rounds % len(PARAMS)]
    expected = answers.to(COPYING, params)
    request = cluster.submit(COPYING, params, expected)
    for _ in range(num_rounds):
        network.go_round()
    is_plain = bool(num_rounds % 2)
    network._runners["decode"] = make_runner(64, kind) if is_plain else make_guessing(64)
    network.kill("decode")
    cluster.settle()
    assert request.token_ids == expected and request.num_attempts == 2


def test_it_guesses_well_what_it_was_told_of(
    make_guessing: Callable[..., Any], answers: Answers
) -> None:
    """With the noise of the tokens that it guesses, in every way of drawing."""
    num_drafted = num_accepted = 0
    for params in PARAMS[:3]:
        runner = make_guessing(64)
        worker = OneWorker(runner)
        expected = answers.to(PLAIN, params)
        assert worker.answer(Sequence(AttemptKey("r", 0, 1), PLAIN, params)) == expected
        num_drafted += worker.counters["drafted_tokens"]
        num_accepted += worker.counters["accepted_tokens"]
        runner.check()
    assert num_drafted > num_accepted > num_drafted / 4 > 10, "by chance one of 61"


def test_who_does_not_want_it_gets_none(
    make_guessing: Callable[..., Any], answers: Answers
) -> None:
    params = dataclasses.replace(PARAMS[0], speculate=False)
    runner = make_guessing(64)
    worker = OneWorker(runner)
    expected = answers.to(PLAIN, params)
    assert worker.answer(Sequence(AttemptKey("r", 0, 1), PLAIN, params)) == expected
    assert worker.counters["drafts"] == 0 and not runner.drafter._known


def test_it_is_no_part_of_what_workers_must_have_in_common(
    make_runner: MakeRunner, make_guessing: Callable[..., Any], kind: str
) -> None:
    plain, guessing = make_runner(48, kind), make_guessing(48)._runner
    assert plain.kv_cache.layout() == guessing.kv_cache.layout()
    assert plain.numerics == guessing.numerics and plain.capacity == guessing.capacity
    assert plain.model_identity.digest == guessing.model_identity.digest
