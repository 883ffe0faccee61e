"""Drawing: the right distribution, and a pure function of each row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from baton.kernels.reference_sampling import random_bits, sample
from baton.shared.engine.sampler import draw_key, sample_tokens
from baton.shared.kv.drawn import NOTHING_LEFT
from baton.shared.sampling import SamplingParams

NUM_DRAWS = 200_000
GATE = 1e-6
LOGITS = torch.tensor([2.0, 1.5, 1.5, 1.0, 0.3, 0.0, -0.5, -1.0, -2.0, -4.0, 2.2, 0.9])
CASES = {
    "plain": SamplingParams(),
    "hot": SamplingParams(temperature=1.7),
    "cold": SamplingParams(temperature=0.4),
    "top-k": SamplingParams(top_k=4),
    "top-p": SamplingParams(top_p=0.75),
    "min-p": SamplingParams(min_p=0.3),
    "all": SamplingParams(temperature=1.3, top_k=9, top_p=0.9, min_p=0.15),
}


def expected_probabilities(logits: Sequence[float], params: SamplingParams) -> Tensor:
    """The same filters written down a second time, one after another, in float64."""
    weights = (torch.tensor(logits, dtype=torch.float64) / params.temperature).softmax(0)
    if params.top_k:
        weights[weights < weights.sort(descending=True).values[params.top_k - 1]] = 0
    weights /= weights.sum()
    total, kept = 0.0, 0.0
    for weight in weights.sort(descending=True).values.tolist():
        if total >= params.top_p:
            break
        total, kept = total + weight, weight
    weights[weights < kept] = 0
    weights[weights < params.min_p * weights.max()] = 0
    return weights / weights.sum()


def draw(params: SamplingParams, keys: Sequence[int], logits: Tensor = LOGITS) -> Tensor:
    num_rows = len(keys)
    return sample(
        logits.expand(num_rows, -1),
        torch.full((num_rows,), params.temperature),
        torch.full((num_rows,), params.top_k),
        torch.full((num_rows,), params.top_p),
        torch.full((num_rows,), params.min_p),
        torch.tensor(list(keys)),
    )


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's chi-square; a count where nothing can be drawn gives 0."""
    possible = probabilities > 0
    if int(counts[~possible].sum()):
        return 0.0
    expected = probabilities[possible] * counts.sum()
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor(float(possible.sum() - 1), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_distribution(case: str) -> None:
    params = CASES[case]
    tokens = draw(params, [draw_key(11, 0, position) for position in range(NUM_DRAWS)])
    counts = tokens.bincount(minlength=len(LOGITS)).double()
    assert p_value(counts, expected_probabilities(LOGITS.tolist(), params)) > GATE


@pytest.mark.parametrize("case", CASES)
def test_a_temperature_off_by_five_percent_is_noticed(case: str) -> None:
    params = CASES[case]
    broken = dataclasses.replace(params, temperature=params.temperature * 1.05)
    tokens = draw(broken, [draw_key(11, 0, position) for position in range(NUM_DRAWS)])
    counts = tokens.bincount(minlength=len(LOGITS)).double()
    assert p_value(counts, expected_probabilities(LOGITS.tolist(), params)) < GATE


@pytest.mark.parametrize(
    "next_key",
    [
        lambda i: (draw_key(i, 0, 7), draw_key(i, 0, 8)),
        lambda i: (draw_key(i, 0, 7), draw_key(i, 1, 7)),
        lambda i: (draw_key(i, 0, 7), draw_key(i + 1, 0, 7)),
        lambda i: (draw_key(3, i, 7), draw_key(3, i, 8)),
        lambda i: (draw_key(3, 0, 2 * i), draw_key(3, 0, 2 * i + 1)),
    ],
    ids=["positions", "samples", "seeds", "samples-by-position", "pairs-of-positions"],
)
def test_neighbouring_draws_are_independent(next_key: Callable[[int], tuple[int, int]]) -> None:
    pairs = [next_key(i) for i in range(NUM_DRAWS)]
    first, second = (draw(SamplingParams(), keys) for keys in zip(*pairs, strict=True))
    size = len(LOGITS)
    probabilities = expected_probabilities(LOGITS.tolist(), SamplingParams())
    counts = (first * size + second).bincount(minlength=size * size).double()
    assert p_value(counts, torch.outer(probabilities, probabilities).flatten()) > GATE


def test_bits_are_those_of_splitmix64() -> None:
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [bits % 2**64 for bits in random_bits(torch.tensor([0]), 3)[0].tolist()] == known


def test_a_draw_is_a_function_of_its_row() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(24, 2000, generator=generator) * 3
    logits[::3] *= 0.05
    params = [
        SamplingParams(
            temperature=[0.0, 0.7, 1.0, 3.0][i % 4],
            top_k=[0, 1, 300, 50][i % 4 if i < 12 else 0],
            top_p=[1.0, 0.5, 0.98][i % 3],
            min_p=[0.0, 0.02][i % 2],
            seed=[0, 5, 2**64 - 1][i % 3],
        )
        for i in range(24)
    ]
    samples, positions = [i % 2 for i in range(24)], list(range(24))
    together = sample_tokens(logits, params, samples, positions)
    for i in range(24):
        alone = sample_tokens(logits[i : i + 1], [params[i]], [samples[i]], [positions[i]])
        assert alone == [together[i]]
    order = torch.randperm(24, generator=generator).tolist()
    shuffled = sample_tokens(
        logits[order],
        [params[i] for i in order],
        [samples[i] for i in order],
        [positions[i] for i in order],
    )
    assert shuffled == [together[i] for i in order]


@pytest.mark.parametrize("top_k", [0, 300, 1500])
@pytest.mark.parametrize("top_p", [1.0, 0.99])
def test_filters_that_need_the_whole_vocabulary(top_k: int, top_p: float) -> None:
    """A flat distribution: the tokens that decide are far behind the most likely ones."""
    logits = torch.linspace(0, 2, 2000)[torch.randperm(2000)]
    params = SamplingParams(top_k=top_k, top_p=top_p)
    allowed = expected_probabilities(logits.tolist(), params) > 0
    drawn = draw(params, [draw_key(1, 0, i) for i in range(2000)], logits).bincount(minlength=2000)
    assert not drawn[~allowed].any()
    least_likely = torch.where(allowed, logits, torch.inf).argsort()[:200]
    assert drawn[least_likely].any()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1e-30),
        SamplingParams(top_k=1),
        SamplingParams(top_p=0.0),
        SamplingParams(top_p=1e-9),
        SamplingParams(min_p=1.0),
        SamplingParams(top_k=1, top_p=1e-9, min_p=1.0),
    ],
)
def test_the_most_likely_token_survives(params: SamplingParams) -> None:
    logits = torch.randn(64, 500) * 100
    tokens = sample_tokens(logits, [params] * 64, [0] * 64, list(range(64)))
    assert tokens == logits.argmax(-1).tolist()


def test_equals_of_the_last_token_kept_are_kept() -> None:
    logits = torch.tensor([1.0, 3.0, 1.0, 2.0, 0.0])
    tokens = draw(SamplingParams(top_k=3), [draw_key(1, 0, i) for i in range(2000)], logits)
    assert set(tokens.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_seen(temperature: float) -> None:
    """As on a GPU, where the largest of them is looked at first."""
    logits = torch.zeros(4, 50)
    logits[0, 7] = float("inf")
    logits[1, 7] = float("nan")
    logits[2] = float("-inf")
    params = [SamplingParams(temperature=temperature)] * 4
    tokens = sample_tokens(logits, params, [0] * 4, [9] * 4)
    assert tokens[:3] == [-1, -1, NOTHING_LEFT] and tokens[3] >= 0
