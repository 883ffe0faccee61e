"""What is offered: arrivals, lengths, conversations, and their shares."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace

import pytest

from baton.loadtest.arrivals import arrivals
from baton.loadtest.conversations import longest, workload_of
from baton.loadtest.drivers import request_of
from baton.loadtest.lengths import lengths
from baton.loadtest.shard import Share
from baton.loadtest.spec import Load, LoadError

CLOSED = Load("grpc://nobody:1", prompt_tokens="40", output_tokens="8", num_requests=10)
OPEN = replace(CLOSED, arrivals="poisson", rate=20.0, num_requests=None, duration_s=200.0)


def gaps(load: Load) -> list[float]:
    times = arrivals(load)
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def test_arrivals_have_the_rate_and_the_spread_that_were_asked_for() -> None:
    constant = replace(OPEN, arrivals="constant")
    bursty = replace(OPEN, arrivals="bursty", burstiness=3.0)
    for load, variation in ((OPEN, 1.0), (constant, 0.0), (bursty, 3.0)):
        found = gaps(load)
        mean = statistics.fmean(found)
        assert mean == pytest.approx(1 / 20, rel=0.2)
        assert statistics.stdev(found) / mean == pytest.approx(variation, rel=0.2, abs=1e-6)
        assert arrivals(load) == arrivals(load)
    assert arrivals(replace(constant, duration_s=0.2)) == pytest.approx([0.05, 0.1, 0.15])
    assert len(arrivals(replace(OPEN, duration_s=None, num_requests=7))) == 7


def test_lengths_follow_their_distributions() -> None:
    draw = random.Random(1)

    def drawn(text: str) -> list[int]:
        one = lengths(text, "--prompt-tokens")
        return [one(draw) for _ in range(4000)]

    assert set(drawn("512")) == {512} == set(drawn("fixed:512"))
    uniform = drawn("uniform:10:20")
    assert (min(uniform), max(uniform)) == (10, 20)
    assert statistics.fmean(drawn("normal:500:50")) == pytest.approx(500, rel=0.02)
    assert statistics.median(drawn("lognormal:500:0.8")) == pytest.approx(500, rel=0.1)
    assert min(drawn("normal:2:50")) == 1


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "1.5", "ten", "uniform:9:3", "normal:5", "weibull:1:2", "fixed:nan"]
)
def test_a_length_that_is_none_is_told_with_its_flag(text: str) -> None:
    with pytest.raises(LoadError, match=r"--prompt-tokens .*lognormal:MEDIAN:SIGMA"):
        lengths(text, "--prompt-tokens")


def test_prompts_are_a_function_of_load_and_number() -> None:
    (turn,) = workload_of(CLOSED).conversation(3)
    prompt = turn.token_ids(CLOSED)
    assert prompt == workload_of(CLOSED).conversation(3)[0].token_ids(CLOSED)
    assert len(prompt) == 40 and max(prompt) < CLOSED.vocab_size and turn.output_tokens == 8
    other = replace(CLOSED, seed=1)
    assert prompt != workload_of(other).conversation(3)[0].token_ids(other)
    assert prompt != workload_of(CLOSED).conversation(4)[0].token_ids(CLOSED)


def test_prompts_of_a_group_begin_alike_and_differ_after() -> None:
    load = replace(CLOSED, num_prefixes=2, prefix_tokens=30)
    prompts = [workload_of(load).conversation(n)[0].token_ids(load) for n in range(20)]
    assert {len(prompt) for prompt in prompts} == {40}
    assert len({tuple(prompt[:30]) for prompt in prompts}) == 2
    assert len({tuple(prompt[30:]) for prompt in prompts}) == 20
    # A prompt that is shorter than its prefix keeps a token of its own.
    short = replace(load, prompt_tokens="20")
    prompts = [workload_of(short).conversation(n)[0].token_ids(short) for n in range(20)]
    assert {len(prompt) for prompt in prompts} == {20}
    assert len({tuple(prompt[:19]) for prompt in prompts}) == 2


def test_turns_bring_what_is_new_and_the_longest_counts_all() -> None:
    load = replace(CLOSED, num_turns=3)
    turns = workload_of(load).conversation(0)
    assert [turn.num_tokens for turn in turns] == [40, 40, 40]
    assert len({tuple(turn.token_ids(load)) for turn in turns}) == 3
    assert longest(workload_of(load), load) == 3 * 48


def test_caps_hold_for_drawn_lengths() -> None:
    load = replace(CLOSED, prompt_tokens="lognormal:500:1", max_prompt=100, max_output=5)
    found = [workload_of(load).conversation(n)[0] for n in range(50)]
    assert max(turn.num_tokens for turn in found) == 100
    assert {turn.output_tokens for turn in found} == {5}


def test_shares_are_the_whole() -> None:
    shares = [Share(index, 3) for index in range(3)]
    assert [share.of(10) for share in shares] == [4, 3, 3]
    assert [share.of(2) for share in shares] == [1, 1, 0]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rate": 0.0}, "--rate: more than 0"),
        ({"rate": float("nan")}, "--rate: more than 0"),
        ({"rate": float("inf")}, "--rate: more than 0"),
        ({"rate": 1e9}, "at most 1,000,000"),
        ({"duration_s": -1.0}, "--duration"),
        ({"duration_s": None}, "give --duration or --requests"),
        ({"num_requests": 0}, "--requests"),
        ({"num_streams": 0}, "--streams"),
        ({"burstiness": 0.0}, "--burstiness"),
        ({"time_scale": 0.0}, "--time-scale"),
        ({"max_prompt": 0}, "--max-prompt"),
        ({"arrivals": "trace"}, "--trace: name a file"),
    ],
)
def test_an_impossible_load_names_its_flag(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(LoadError, match=problem):
        replace(OPEN, **changes).check()  # type: ignore[arg-type]


def test_a_request_is_greedy_unless_told_otherwise() -> None:
    request = request_of([1, 2], 5)
    assert list(request.token_ids.token_ids) == [1, 2] and request.sampling.max_tokens == 5
    assert request.sampling.temperature == 0.0 and request.sampling.ignore_eos
    assert request_of([1], 1, temperature=0.5).sampling.temperature == 0.5
