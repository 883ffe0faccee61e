"""Penalties, biases and bans: those of transformers, or of a loop that says what OpenAI's are."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from baton.kernels.reference_sampling import sample
from baton.shared.engine.sampler import draw_key, sample_tokens
from baton.shared.engine.shaping import KnownTokens, Shaping, apply_shaping
from baton.shared.kv.drawn import NOTHING_LEFT
from baton.shared.sampling import SamplingParams
from tests.unit.engine.test_sampler import GATE, NUM_DRAWS, expected_probabilities, p_value

VOCAB = 60
EOS = 2
PROMPT = (5, 9, 13, 7, 5, 40)
EMITTED = (13, 21, 13, 8, 21, 13)
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=12)
Sequences = Sequence[tuple[int, ...]]


def logits_of(seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 4


def shaping_of(
    params: SamplingParams,
    prompt: Sequence[int] = PROMPT,
    emitted: Sequence[int] = EMITTED,
    banned: Sequences = (),
) -> tuple[Shaping | None, int]:
    """And the position behind all tokens."""
    history = KnownTokens((*prompt, *emitted), len(prompt), banned)
    return Shaping.of(params, history, [EOS]), len(prompt) + len(emitted)


def shaped(
    logits: Tensor,
    params: SamplingParams,
    prompt: Sequence[int] = PROMPT,
    emitted: Sequence[int] = EMITTED,
    banned: Sequences = (),
) -> Tensor:
    shaping, end = shaping_of(params, prompt, emitted, banned)
    assert shaping is not None
    result = logits.clone()
    apply_shaping(result, shaping, end, ())
    return result


def theirs(processor: Any, logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    scores: Tensor = processor(torch.tensor([list(token_ids)]), logits[None].clone())
    return scores[0]


@pytest.mark.parametrize("penalty", [1.3, 0.7, 2.0])
def test_repetition_is_that_of_transformers(penalty: float) -> None:
    logits = logits_of()
    expected = theirs(
        RepetitionPenaltyLogitsProcessor(penalty=penalty), logits, (*PROMPT, *EMITTED)
    )
    assert torch.equal(shaped(logits, SamplingParams(repetition_penalty=penalty)), expected)


@given(emitted=TOKENS, num_drafts=st.integers(0, 4))
def test_bad_words_are_those_of_transformers(emitted: list[int], num_drafts: int) -> None:
    """Of the answer: what the prompt ends with is not part of it."""
    words = [(4,), (21, 8), (13, 21), (1, 2, 3), (13, 21, 13), (7, 7)]
    emitted = [[1, 2, 13, 21, 7][each % 5] for each in emitted]
    logits = logits_of()
    expected = theirs(
        NoBadWordsLogitsProcessor([list(each) for each in words], eos_token_id=EOS), logits, emitted
    )
    result = logits.clone()
    split = max(0, len(emitted) - num_drafts)
    shaping, _ = shaping_of(SamplingParams(), PROMPT, emitted[:split], words)
    assert shaping is not None
    apply_shaping(result, shaping, len(PROMPT) + split, emitted[split:])
    assert torch.equal(result, expected)


@pytest.mark.parametrize("num_emitted", [0, 3, 4, 6])
def test_min_tokens_are_those_of_transformers(num_emitted: int) -> None:
    logits, emitted = logits_of(), EMITTED[:num_emitted]
    expected = theirs(
        MinNewTokensLengthLogitsProcessor(len(PROMPT), 4, [EOS, 30, 31]),
        logits,
        (*PROMPT, *emitted),
    )
    params = SamplingParams(min_tokens=4, stop_token_ids=frozenset({30, 31}))
    assert torch.equal(shaped(logits, params, emitted=emitted), expected)


def test_biases_are_those_of_transformers() -> None:
    biases = ((3, 2.5), (13, -1.25), (59, 100.0))
    logits = logits_of()
    processor = SequenceBiasLogitsProcessor([[[token], bias] for token, bias in biases])
    expected = theirs(processor, logits, PROMPT)
    assert torch.equal(shaped(logits, SamplingParams(logit_bias=biases)), expected)


def test_a_bias_of_minus_100_and_tokens_that_are_not_allowed_are_out() -> None:
    logits = logits_of()
    allowed = frozenset({3, 4, 5, 6})
    params = SamplingParams(allowed_token_ids=allowed, logit_bias=((4, -100.0), (6, 0.5)))
    out = [token for token in range(VOCAB) if token not in {3, 5, 6}]
    expected = theirs(SuppressTokensLogitsProcessor(out), logits, PROMPT)
    expected[6] += 0.5
    assert torch.equal(shaped(logits, params), expected)


def openai_penalties(
    logits: Sequence[float], emitted: Sequence[int], presence: float, frequency: float
) -> list[float]:
    """mu[j] -> mu[j] - c[j] * frequency - float(c[j] > 0) * presence, as OpenAI writes it."""
    result = list(logits)
    for token in set(emitted):
        result[token] -= emitted.count(token) * frequency + presence
    return result


@given(
    emitted=TOKENS.map(tuple),
    presence=st.floats(-2, 2, width=32),
    frequency=st.floats(-2, 2, width=32),
)
def test_presence_and_frequency_are_those_of_openai(
    emitted: tuple[int, ...], presence: float, frequency: float
) -> None:
    logits = logits_of()
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    expected = openai_penalties(logits.double().tolist(), emitted, presence, frequency)
    shaping, end = shaping_of(params, emitted=emitted)
    result = logits.clone()
    if shaping is not None:
        apply_shaping(result, shaping, end, ())
    assert result.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-5)


ALL = SamplingParams(
    presence_penalty=0.7,
    frequency_penalty=0.4,
    repetition_penalty=1.2,
    min_tokens=5,
    logit_bias=((13, 1.5), (8, -100.0), (40, -3.0)),
    allowed_token_ids=frozenset(range(1, 50)),
    stop_token_ids=frozenset({30}),
)
BANNED = ((44,), (13, 21), (21, 13, 9))


@given(prompt=TOKENS.filter(bool), emitted=TOKENS, data=st.data())
def test_the_split_into_attempts_steps_and_drafts_says_nothing(
    prompt: list[int], emitted: list[int], data: st.DataObject
) -> None:
    """What counts is where the answer begins: who computed what, step by step or at once, and how
    much of it was a guess, does not."""
    logits = logits_of()
    whole = shaped(logits, ALL, prompt, emitted, BANNED)
    shaping, end = shaping_of(ALL, prompt, emitted, BANNED)
    assert shaping is not None
    # In any order: steps that failed are computed again.
    for at in data.draw(st.lists(st.integers(len(prompt), end), max_size=4)):
        apply_shaping(logits.clone(), shaping, at, ())
    num_drafts = data.draw(st.integers(0, len(emitted)))
    result = logits.clone()
    known_to = end - num_drafts
    apply_shaping(result, shaping, known_to, emitted[len(emitted) - num_drafts :])
    assert torch.equal(result, whole)


def test_prompt_tokens_count_for_repetition_alone() -> None:
    logits = logits_of()
    params = SamplingParams(presence_penalty=2.0, frequency_penalty=2.0)
    assert torch.equal(shaped(logits, params, emitted=()), logits)


def test_a_nan_stays_one_though_it_is_banned() -> None:
    logits = logits_of()
    logits[55] = math.nan
    result = shaped(logits, ALL)
    assert result.isnan().tolist() == logits.isnan().tolist()
    assert sample_tokens(result[None], [ALL], [0], [0]) == [-1]


def test_nothing_left_is_no_token() -> None:
    params = dataclasses.replace(ALL, allowed_token_ids=frozenset({8, EOS}))
    result = shaped(logits_of(), params, emitted=())
    rows = torch.stack([result, logits_of()])
    for temperature in (0.0, 1.0):
        drawn = dataclasses.replace(params, temperature=temperature)
        tokens = sample_tokens(rows, [drawn, SamplingParams(temperature=0)], [0, 0], [0, 0])
        assert tokens == [NOTHING_LEFT, int(logits_of().argmax())]


@pytest.mark.parametrize("penalty", [2.0**-126, 2.0**127])
def test_extreme_penalties_leave_a_token_to_draw(penalty: float) -> None:
    logits = logits_of().abs() + 1
    params = SamplingParams(repetition_penalty=penalty, temperature=0)
    result = shaped(logits, params)
    assert result.isfinite().all()
    [token] = sample_tokens(result[None], [params], [0], [0])
    assert (token in {*PROMPT, *EMITTED}) is (penalty < 1)


def test_who_asks_nothing_gets_nothing() -> None:
    assert shaping_of(SamplingParams(temperature=0.3, top_k=5))[0] is None
    with pytest.raises(ValueError, match="needs its history"):
        Shaping.of(SamplingParams(presence_penalty=1), None, [EOS])


# Frequencies of what is drawn

SMALL = 12
SMALL_PROMPT, SMALL_EMITTED = (1, 2, 2, 9), (3, 3, 3, 5, 0)
DRAWN = {
    "presence": SamplingParams(presence_penalty=0.8),
    "frequency": SamplingParams(frequency_penalty=0.5, temperature=1.2),
    "repetition": SamplingParams(repetition_penalty=1.4),
    "bias": SamplingParams(logit_bias=((1, 0.9), (6, -1.0), (2, -100.0))),
    "all": SamplingParams(
        presence_penalty=0.6,
        frequency_penalty=-0.4,
        repetition_penalty=1.2,
        logit_bias=((0, 1.0), (7, -100.0)),
        allowed_token_ids=frozenset(range(10)),
        min_tokens=9,
        top_k=7,
        temperature=0.9,
    ),
}


def plainly(logits: list[float], params: SamplingParams, emitted: Sequence[int]) -> list[float]:
    """All of it written down a second time, one token after another."""
    result = []
    for token, logit in enumerate(logits):
        logit += dict(params.logit_bias).get(token, 0.0)
        if token in SMALL_PROMPT or token in emitted:
            factor = params.repetition_penalty
            logit = logit / factor if logit > 0 else logit * factor
        logit -= emitted.count(token) * params.frequency_penalty
        logit -= (token in emitted) * params.presence_penalty
        is_out = dict(params.logit_bias).get(token) == -100 or (
            len(emitted) < params.min_tokens and token == EOS
        )
        if is_out or params.allowed_token_ids and token not in params.allowed_token_ids:
            logit = -math.inf
        result.append(logit)
    return result


@functools.cache
def keys() -> Tensor:
    return torch.tensor([draw_key(11, 0, position) for position in range(NUM_DRAWS)])


def frequencies(params: SamplingParams, emitted: Sequence[int]) -> Tensor:
    logits = shaped(logits_of(5, SMALL) / 3, params, SMALL_PROMPT, emitted)

    def column(value: float) -> Tensor:
        return torch.full((NUM_DRAWS,), value)

    tokens = sample(
        logits.expand(NUM_DRAWS, -1),
        column(params.temperature),
        column(params.top_k),
        column(params.top_p),
        column(params.min_p),
        keys(),
    )
    return tokens.bincount(minlength=SMALL).double()


@pytest.mark.parametrize("case", DRAWN)
def test_draws_follow_what_was_asked(case: str) -> None:
    params = DRAWN[case]
    logits = plainly((logits_of(5, SMALL) / 3).double().tolist(), params, SMALL_EMITTED)
    expected = expected_probabilities(logits, params)
    assert p_value(frequencies(params, SMALL_EMITTED), expected) > GATE


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("presence", {"presence_penalty": 0.75}),
        ("frequency", {"frequency_penalty": 0.47}),
        ("repetition", {"repetition_penalty": 1.35}),
        ("bias", {"logit_bias": ((1, 0.75), (6, -1.0), (2, -100.0))}),
        ("bias", {"logit_bias": ((1, 0.9), (6, -1.0), (2, -7.0))}),
        ("all", {"min_tokens": 0}),
        ("all", {"emitted": (3, 3, 5, 0)}),
    ],
)
def test_a_sampler_that_is_off_is_noticed(case: str, fault: dict[str, Any]) -> None:
    params = DRAWN[case]
    logits = plainly((logits_of(5, SMALL) / 3).double().tolist(), params, SMALL_EMITTED)
    expected = expected_probabilities(logits, params)
    emitted = fault.get("emitted", SMALL_EMITTED)
    changed = {name: value for name, value in fault.items() if name != "emitted"}
    broken = dataclasses.replace(params, **changed)
    assert p_value(frequencies(broken, emitted), expected) < GATE


def test_marks_are_made_once_and_go_on() -> None:
    """A long prompt is read for the first token only."""
    emitted = random.Random(0).choices(range(VOCAB), k=20)
    reads: list[tuple[int, int]] = []

    class Watched(KnownTokens):
        def token_slice(self, start: int, end: int) -> Sequence[int]:
            reads.append((start, end))
            return super().token_slice(start, end)

    history = Watched((*PROMPT, *emitted), len(PROMPT))
    shaping = Shaping.of(SamplingParams(repetition_penalty=2.0), history, [EOS])
    assert shaping is not None
    for end in range(len(PROMPT), len(PROMPT) + 20):
        marks = shaping.marks(VOCAB, end)
        counts = np.bincount(emitted[: end - len(PROMPT)], minlength=VOCAB)
        assert ((marks & 0xFFFFFF) == counts).all()
    assert reads[0] == (0, len(PROMPT)) and all(end - start == 1 for start, end in reads[1:])
