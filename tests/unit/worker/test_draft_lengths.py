"""How many drafts are checked: against made-up engines whose steps cost what a table says."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from baton.services.decode.draft_lengths import DraftLengths

MOST = 7
Cost = Callable[[int, int], float]
"""(rows, guesses) → seconds of a step."""


def free(rows: int, guesses: int) -> float:
    """A small batch on a device that waits for its memory."""
    return 0.010


def padded(rows: int, guesses: int) -> float:
    """A CPU: up to 16 tokens cost about the same, what is beyond costs its share."""
    return 0.010 + 0.0005 * max(0, rows + guesses - 16) + 0.00005 * guesses


def by_token(rows: int, guesses: int) -> float:
    """A full batch: every token costs the same."""
    return 0.001 * (rows + guesses)


@dataclass
class Outcome:
    speed: float
    """Tokens per second over those without drafts."""
    share_checked: float
    """Of the last steps, those with drafts."""
    longest: int
    """The most drafts of a sequence in them."""


def run(cost: Cost, chances: list[float], num_steps: int = 3000, noise: float = 0.0) -> Outcome:
    """A batch of sequences whose guesses stand with these chances; guesses are always there."""
    draw = random.Random(7)
    lengths = DraftLengths(MOST)
    names = [f"sequence {index}" for index in range(len(chances))]
    seconds = plain = 0.0
    num_tokens = num_checked = longest = 0
    rows = len(chances)
    for step in range(num_steps):
        wanted = lengths.wanted(rows, names)
        offers = [(name, most, 0) for name, most in zip(names, wanted, strict=True) if most]
        chosen = lengths.choose(rows, offers, 512) if offers else []
        num_tokens += rows
        for (name, _, _), length in zip(offers, chosen, strict=True):
            if not length:
                continue
            chance, stood = chances[names.index(name)], 0
            while stood < length and draw.random() < chance:
                stood += 1
            lengths.checked(name, length, stood)
            num_tokens += stood
        took = cost(rows, sum(chosen))
        seconds, plain = seconds + took, plain + cost(rows, 0)
        lengths.took_step(
            took * draw.uniform(1 - noise, 1 + noise), num_rows=rows, num_guesses=sum(chosen)
        )
        if step >= num_steps - 200:
            num_checked += bool(sum(chosen))
            longest = max(longest, *chosen) if chosen else longest
    return Outcome((num_tokens / seconds) / (rows * num_steps / plain), num_checked / 200, longest)


@pytest.mark.parametrize(
    ("cost", "chances", "at_least"),
    [
        # What costs nothing is always worth it: nearly all that chains of seven bring.
        (free, [0.9], 0.95 * (1 - 0.9**8) / (1 - 0.9)),
        (free, [0.1], 1.04),
        (padded, [0.9], 0.9 * (1 - 0.9**8) / (1 - 0.9)),
        (padded, [0.8] * 4, 2.0),
        # One of many copies; its drafts cost the others little.
        (padded, [0.95] + [0.0] * 8, 1.3),
        (by_token, [0.9] * 2, 0.99),
    ],
)
def test_drafts_that_pay_are_checked(cost: Cost, chances: list[float], at_least: float) -> None:
    assert run(cost, chances, num_steps=2000, noise=0.1).speed > at_least


@pytest.mark.parametrize("rows", [1, 8, 32, 128])
@pytest.mark.parametrize("cost", [padded, by_token])
def test_text_that_drafts_badly_costs_a_hundredth_at_most(cost: Cost, rows: int) -> None:
    num_steps = 3000 if rows < 100 else 1500
    assert run(cost, [0.02] * rows, num_steps, noise=0.1).speed > 0.99


def test_a_full_batch_checks_none() -> None:
    """A draft costs what a token costs, and stands seldomer: even good ones slow everybody down."""
    outcome = run(by_token, [0.8] * 64)
    assert outcome.speed > 0.99 and outcome.share_checked < 0.1


def test_a_sequence_that_begins_to_copy_is_noticed() -> None:
    """Nothing is expected of it, until a guess that was let go along proves right."""
    lengths, chance = DraftLengths(MOST), 0.0
    checked = []
    for step in range(3000):
        if step == 2000:
            chance = 1.0
        [wanted] = lengths.wanted(1, ["a"])
        [length] = lengths.choose(1, [("a", wanted, 0)], 512) if wanted else [0]
        if length:
            lengths.checked("a", length, length if chance else 0)
        lengths.took_step(0.010 + 0.001 * length, num_rows=1, num_guesses=length)
        checked.append(length)
    assert sum(map(bool, checked[1000:2000])) < 60
    assert sum(length == MOST for length in checked[2500:]) > 450


def test_guesses_behind_a_supposition_count_for_less() -> None:
    """One of two equal chains stands only if what is being drawn was guessed right as well."""
    lengths = DraftLengths(MOST)
    lengths.took_step(0.010, num_rows=2, num_guesses=0)
    for num_guesses, seconds in ((1, 0.011), (3, 0.013), (7, 0.017), (14, 0.024)):
        lengths.took_step(seconds, num_rows=2, num_guesses=num_guesses)
    for _ in range(20):
        lengths.checked("a", 1, 1)
        lengths.checked("b", 4, 3)
        lengths.checked("a", 4, 3)
    far, near = lengths.choose(2, [("a", 7, 3), ("b", 7, 0)], 7)
    assert far < near


def test_no_more_than_there_is_room_for() -> None:
    lengths = DraftLengths(MOST)
    lengths.took_step(0.01, num_rows=2, num_guesses=0)
    assert sum(lengths.choose(2, [("a", 7, 0), ("b", 7, 0)], 5)) <= 5
    assert lengths.choose(2, [("a", 7, 0), ("b", 7, 0)], 0) == [0, 0]


def test_a_step_waits_for_those_in_flight_only_where_guesses_may_pay() -> None:
    lengths = DraftLengths(3)
    assert not lengths.pays(2, ["a"]), "the first has none: it is what others are measured by"
    lengths.took_step(0.01, num_rows=2, num_guesses=0)
    lengths.checked("a", 3, 3)
    assert lengths.pays(2, ["a"]) and lengths.expects(2)
    for _ in range(8):
        lengths.took_step(0.01, num_rows=2, num_guesses=2)
    assert lengths.wanted(2, ["a"]) == [0] and not lengths.pays(2, ["a"])
    costly = DraftLengths(3)
    for num_guesses in (0, 1, 2, 0):
        costly.took_step(0.01 + 0.1 * num_guesses, num_rows=2, num_guesses=num_guesses)
    assert not costly.pays(2, ["a"]) and not costly.expects(2)


def test_what_is_spent_on_guesses_that_do_not_pay_is_saved_first() -> None:
    lengths = DraftLengths(3)
    for num_guesses in (0, 1, 2, 0):
        lengths.took_step(0.01 + 0.1 * num_guesses, num_rows=1, num_guesses=num_guesses)
    for _ in range(15_000):
        lengths.took_step(0.01, num_rows=1, num_guesses=0)
    assert lengths.wanted(1, ["a"]) == [1], "there is time for a try"
    lengths.spent(10.0)
    assert lengths.wanted(1, ["a"]) == [0]
