"""How many tokens a step takes, by the rates that steps of several sizes were measured at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

TOKEN_BUDGETS = (512, 1024, 2048, 4096)
"""What is measured on a GPU."""
MEASURED_TOKENS = 8192
"""Of each kind of load."""
PACKED_TOKENS = 256
"""Of short prompts."""
SHORT_CHUNKS = (2, 9, 17, 40, 65, 129)
"""Tokens of prompts that kernels are warmed up with: one of each number of rows for which products
are cut in another way (kernels/scaled_table.py, kernels/streamed_linear.py)."""
_GOOD_ENOUGH, _GOOD_ENOUGH_FOR_A_BACKLOG = 0.95, 0.99
"""The smallest token budget with so much of the best throughput is taken: steps stay short."""


def choose_budgets(rates: Mapping[int, Sequence[float]]) -> tuple[int, int]:
    """The tokens of a usual step, and of one where prompts have queued up.

    `rates`: by token budget, prompt tokens per second of each kind of load.
    """
    best = [max(each) for each in zip(*rates.values(), strict=True)]
    shares = {
        budget: min(rate / most for rate, most in zip(of_budget, best, strict=True))
        for budget, of_budget in rates.items()
    }
    # Of no budget both rates may be the best ones.
    most = max(shares.values())

    def smallest(share: float) -> int:
        return min(budget for budget, own in shares.items() if own >= share * most)

    return smallest(_GOOD_ENOUGH), smallest(_GOOD_ENOUGH_FOR_A_BACKLOG)


def long_steps(num_tokens: int, budget: int) -> list[list[range]]:
    """One long prompt in steps of so many tokens."""
    starts = range(0, num_tokens, budget)
    return [[range(start, min(start + budget, num_tokens))] for start in starts]


def packed_steps(num_tokens: int, budget: int, most_rows: int) -> list[list[range]]:
    """Short prompts, as many in each step as its budget takes, and as many tokens in all as the
    long prompt has."""
    num_rows = min(max(budget // num_tokens, 1), most_rows)
    num_steps = max(MEASURED_TOKENS // (num_rows * num_tokens), 1)
    return [[range(min(num_tokens, budget))] * num_rows] * num_steps
