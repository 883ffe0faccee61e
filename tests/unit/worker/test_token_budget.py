"""How many tokens a step takes: the table, and that nobody's first token gets later by it."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq

import pytest

from baton.services.prefill.scheduler import choose_chunks
from baton.services.prefill.token_budget import TokenBudget
from baton.shared.engine.token_budgets import choose_budgets
from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.sampling import SamplingParams

BUDGET = TokenBudget(512, 2048)
BLOCK_SIZE = 16


def prompt(num_tokens: int, num_done: int = 0) -> Sequence:
    made = Sequence(AttemptKey("r", 0, 1), (0,) * num_tokens, SamplingParams(max_tokens=1))
    made.num_room_tokens, made.num_scheduled_tokens = num_tokens, num_done
    return made


@pytest.mark.parametrize(
    ("lengths", "num_decoding", "expected"),
    [
        ([], 0, 512),
        # Short prompts: the first one's token would wait for the others'.
        ([100], 0, 512),
        ([500, 400, 300, 5000], 0, 512),
        ([513, 5000], 0, 512),
        # All are long.
        ([1024] * 16, 0, 512),
        ([1025] * 16, 0, 1024),
        ([9000, 9000], 0, 2048),
        # An eighth of each step is the oldest's: the first one takes three of 448.
        ([9000, 1100], 0, 1024),
        # One alone is handed over while it goes on.
        ([1500], 0, 512),
        ([4096], 0, 1024),
        ([100_000], 0, 2048),
        # Streams wait for no prompt.
        ([9000, 9000], 1, 512),
    ],
)
def test_table(lengths: list[int], num_decoding: int, expected: int) -> None:
    prefilling = [prompt(length) for length in lengths]
    of_step = BUDGET.of_step(prefilling, num_decoding=num_decoding, block_size=BLOCK_SIZE)
    assert of_step == expected
    other = TokenBudget(512).of_step(prefilling, num_decoding=0, block_size=BLOCK_SIZE)
    assert other == 512, "a worker that also decodes"


def test_what_is_left_counts() -> None:
    prefilling = [prompt(9000, 8800), prompt(9000)]
    assert BUDGET.of_step(prefilling, num_decoding=0, block_size=BLOCK_SIZE) == 512


def test_prompts_whose_last_chunk_is_under_way_do_not_count() -> None:
    """On a GPU their first token is drawn while the next step is planned."""
    for others, expected in (([9000, 9000], 2048), ([4096], 1024)):
        prefilling = [prompt(600, 600), *map(prompt, others)]
        of_step = BUDGET.of_step(prefilling, num_decoding=0, block_size=BLOCK_SIZE)
        assert of_step == expected


def first_tokens(lengths: Seq[int], budget: TokenBudget) -> list[float]:
    """When each prompt is done; a step takes as long as its tokens, and a bit."""
    prompts = [prompt(length) for length in lengths]
    left, now, done = list(prompts), 0.0, dict.fromkeys(range(len(prompts)), 0.0)
    while left:
        tokens = budget.of_step(left, num_decoding=0, block_size=BLOCK_SIZE)
        chunks = choose_chunks(left, token_budget=tokens, max_rows=256, block_size=BLOCK_SIZE)
        now += 0.5 + sum(chunk.num_tokens for chunk in chunks) / 40
        for chunk in chunks:
            chunk.sequence.num_scheduled_tokens += chunk.num_tokens
        for number, each in enumerate(prompts):
            if each in left and each.num_scheduled_tokens == each.num_prompt_tokens:
                left.remove(each)
                done[number] = now
    return list(done.values())


def test_no_first_token_gets_later() -> None:
    """But for what chunks are cut to whole blocks."""
    source = random.Random(4)
    num_sooner = 0
    for _ in range(150):
        longest = source.choice([600, 3000, 20_000])
        lengths = [source.randint(2, longest) for _ in range(source.randint(1, 8))]
        usual = first_tokens(lengths, TokenBudget(512))
        grown = first_tokens(lengths, BUDGET)
        slack = 2 * BLOCK_SIZE / 40
        assert all(b <= a + slack for a, b in zip(usual, grown, strict=True)), lengths
        num_sooner += sum(b < a for a, b in zip(usual, grown, strict=True))
    assert num_sooner > 100


def test_choice_of_budgets() -> None:
    """By one long prompt and by packed short ones: the smallest that is good enough for both."""
    assert choose_budgets({512: (34e3, 41e3), 1024: (39e3, 42e3), 2048: (40.6e3, 42.1e3)}) == (
        1024,
        2048,
    )
    assert choose_budgets({512: (40e3, 30e3), 1024: (41e3, 40e3)}) == (1024, 1024)
    assert choose_budgets({600: (1.0, 1.0)}) == (600, 600)
    # Of none are both rates the best.
    assert choose_budgets({512: (100.0, 90.0), 1024: (90.0, 100.0)}) == (512, 512)
