"""A prefix that many requests share is computed once, also when all of them come at once."""

from __future__ import annotations

import random

import pytest

from tests.e2e.harness import Stack
from tests.e2e.oracle import Ask, Oracle

pytestmark = pytest.mark.e2e

BLOCK_SIZE = 16
NUM_REQUESTS = 50
NUM_SHARED = 1000
NUM_SHARED_BLOCKS = 62


@pytest.fixture
def stack(tiny_stack: Stack) -> Stack:
    return tiny_stack


def test_common_prefix_is_computed_once(stack: Stack, oracle: Oracle) -> None:
    source = random.Random("shared prefix")
    shared = [source.randrange(3, 512) for _ in range(NUM_SHARED)]
    asks = []
    for number in range(NUM_REQUESTS):
        # The first token of its own sets each apart within the block after the shared ones.
        own = [3 + number, *(source.randrange(3, 512) for _ in range(number))]
        sampling = {"temperature": 1.0, "seed": number} if number % 2 else {}
        asks.append(Ask([*shared, *own], {"max_tokens": 6, **sampling}))

    computed, pulled = NewCounts(stack, "p0"), NewCounts(stack, "d0")
    results = stack.generate_at_once([(ask.prompt, ask.sampling) for ask in asks])

    assert [result.token_ids for result in results] == oracle.answers(asks)
    assert [result.attempts for result in results] == [1] * NUM_REQUESTS
    cached = sorted(result.finished.usage.num_cached_tokens for result in results)
    num_shared_tokens = NUM_SHARED_BLOCKS * BLOCK_SIZE
    assert cached == [0] + [num_shared_tokens] * (NUM_REQUESTS - 1)
    num_own_tokens = sum(len(ask.prompt) - num_shared_tokens for ask in asks)
    num_own_full = sum(len(ask.prompt) // BLOCK_SIZE - NUM_SHARED_BLOCKS for ask in asks)
    assert computed("num_computed_blocks") == NUM_SHARED_BLOCKS + num_own_full
    assert computed("num_computed_prompt_tokens") == num_shared_tokens + num_own_tokens
    assert computed("num_cached_prompt_tokens") == num_shared_tokens * (NUM_REQUESTS - 1)
    num_tails = sum(len(ask.prompt) % BLOCK_SIZE > 0 for ask in asks)
    assert pulled("num_pulled_blocks") == NUM_SHARED_BLOCKS + num_own_full + num_tails
    assert pulled("num_computed_prompt_tokens") == 0
    stack.assert_idle()


class NewCounts:
    """Of one worker, from now on."""

    def __init__(self, stack: Stack, name: str) -> None:
        self._stack, self._name = stack, name
        self._before = stack.state(name).counters

    def __call__(self, counter: str) -> int:
        now = self._stack.state(self._name).counters
        return int(getattr(now, counter) - getattr(self._before, counter))
