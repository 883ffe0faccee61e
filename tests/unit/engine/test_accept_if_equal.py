"""Guessing leaves the distribution of answers as it is, and the test sees what would not.

Sequences of three tokens of small Markov chains, by a model that guesses and one that verifies,
with the engine's own draws and keys; χ² against the exact probabilities, with fixed seeds.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from baton.kernels.reference_sampling import random_bits, sample
from baton.shared.engine.sampler import draw_key, draw_stream

VOCAB = 8
MANY, FEW = 2_000_000, 250_000
ENOUGH = 1e-6
TOP_K = 4

Draw = Callable[[Tensor, Tensor], Tensor]
"""(tokens before, int64 keys) → tokens."""


def logits_of(seed: int) -> Tensor:
    """float32 [token before, token]"""
    return 1.5 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))


def drawing(logits: Tensor, temperature: float = 1.0, top_k: int = 0) -> Draw:
    def draw(before: Tensor, key: Tensor) -> Tensor:
        def column(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((len(before),), value, dtype=dtype)

        return sample(
            logits[before],
            column(temperature, torch.float32),
            column(top_k, torch.int64),
            column(1.0, torch.float32),
            column(0.0, torch.float32),
            key,
        )

    return draw


def keys_of(number: int, seed: int) -> list[Tensor]:
    """By position: those of as many requests, as `draw_key` makes them."""
    streams = random_bits(torch.tensor([seed]), number)[0]
    return [each.contiguous() for each in random_bits(streams, 3).unbind(1)]


def verified(
    target: Draw,
    draft: Draw,
    keys: list[Tensor],
    accepts: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda before, drawn, guess: (
        drawn == guess
    ),
    corrects: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda before, drawn, place: drawn,
) -> Tensor:
    """Three tokens a row, int64 [N, 3]: two guesses, verified together; what fell is done again.

    Args:
        accepts: whether a guess stands, given the token before and what was drawn there.
        corrects: what stands instead of a guess that fell.
    """
    first = torch.zeros(len(keys[0]), dtype=torch.int64)
    guess_1 = draft(first, keys[0])
    guess_2 = draft(guess_1, keys[1])
    drawn_1, drawn_2 = target(first, keys[0]), target(guess_1, keys[1])
    stands_1 = accepts(first, drawn_1, guess_1)
    stands_2 = stands_1 & accepts(guess_1, drawn_2, guess_2)
    token_1 = torch.where(stands_1, guess_1, corrects(first, drawn_1, torch.tensor(0)))
    # The next step, of rows whose first guess fell, begins behind what was drawn instead of it.
    again = (~stands_1).nonzero().flatten()
    token_2 = torch.where(stands_2, guess_2, corrects(guess_1, drawn_2, torch.tensor(1)))
    token_2[again] = target(token_1[again], keys[1][again])
    token_3 = target(token_2, keys[2])
    return torch.stack((token_1, token_2, token_3), 1)


def chance_of(rows: Tensor, logits: Tensor, temperature: float = 1.0, top_k: int = 0) -> float:
    """That so large a χ² comes of these probabilities."""
    exact = logits.double() / temperature
    if top_k:
        exact = exact.masked_fill(exact < exact.topk(top_k).values[:, -1:], float("-inf"))
    step = exact.softmax(-1)
    joint = (step[0][:, None, None] * step[:, :, None] * step[None]).flatten()
    cells = rows @ torch.tensor([VOCAB**2, VOCAB, 1])
    seen = torch.bincount(cells, minlength=VOCAB**3).double()
    possible = joint > 0
    if seen[~possible].any():
        return 0.0
    expected = joint[possible] * len(rows)
    statistic = ((seen[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor((int(possible.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def test_keys_are_the_engine_s() -> None:
    keys = keys_of(3, seed=5)
    streams = random_bits(torch.tensor([5]), 3)[0]
    mixed = random_bits(torch.tensor([draw_stream(9, 0)]), 3)[0].tolist()
    assert mixed == [draw_key(9, 0, position) for position in range(3)]
    assert keys[1].tolist() == [int(random_bits(each[None], 2)[0, 1]) for each in streams]


def test_two_million_answers() -> None:
    """With a guesser that is 5 % off in temperature: its guesses are good, and bias nothing."""
    logits = logits_of(1)
    rows = verified(drawing(logits), drawing(logits, temperature=1.05), keys_of(MANY, seed=2))
    assert chance_of(rows, logits) > ENOUGH


@pytest.mark.parametrize("top_k", [0, TOP_K])
def test_a_guesser_that_knows_little(top_k: int) -> None:
    logits, draft = logits_of(3), drawing(logits_of(4))
    keys = keys_of(FEW, seed=6)
    rows = verified(drawing(logits, 0.8, top_k), draft, keys)
    assert chance_of(rows, logits, 0.8, top_k) > ENOUGH
    # Token for token the answers without guesses.
    before = torch.zeros(FEW, dtype=torch.int64)
    for place, key in enumerate(keys):
        before = drawing(logits, 0.8, top_k)(before, key)
        assert torch.equal(rows[:, place], before)


def test_faults_are_seen() -> None:
    logits = logits_of(3)
    target, draft = drawing(logits), drawing(logits_of(4))
    keys, fresh = keys_of(FEW, seed=7), keys_of(FEW, seed=8)

    def again_with_fresh_noise(before: Tensor, drawn: Tensor, place: Tensor) -> Tensor:
        return target(before, fresh[int(place)])

    def from_the_draft(before: Tensor, drawn: Tensor, place: Tensor) -> Tensor:
        return draft(before, fresh[int(place)])

    def kept_by_the_filter(before: Tensor, drawn: Tensor, guess: Tensor) -> Tensor:
        lowest = logits.topk(TOP_K).values[:, -1]
        return logits[before, guess] >= lowest[before]

    filtered = drawing(logits, top_k=TOP_K)
    assert chance_of(verified(target, draft, keys), logits) > ENOUGH
    faulty = {
        "fresh noise": verified(target, draft, keys, corrects=again_with_fresh_noise),
        "one key": verified(target, draft, [keys[0]] * 3),
        "draft's logits": verified(target, draft, keys, corrects=from_the_draft),
    }
    for fault, rows in faulty.items():
        assert chance_of(rows, logits) < ENOUGH, fault
    rows = verified(filtered, draft, keys, accepts=kept_by_the_filter)
    assert chance_of(rows, logits, top_k=TOP_K) < ENOUGH
