"""A prefix that many requests share is computed once, also when all of them come at once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Stack
from tests.e2e.oracle import Ask, Oracle

pytestmark = pytest.mark.e2e

BLOCK_SIZE = 16
NUM_REQUESTS = 50
NUM_SHARED = 1000
NUM_SHARED_BLOCKS = 62


@pytest.fixture(scope="module")
def stack(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    workers = {"p0": "prefill", "d0": "decode"}
    with Stack(tiny_model, tmp_path_factory.mktemp("stack"), workers) as stack:
        yield stack


def test_common_prefix_is_computed_once(stack: Stack, oracle: Oracle) -> None:
    source = random.Random(0)
    shared = [source.randrange(3, 512) for _ in range(NUM_SHARED)]
    asks = []
    for number in range(NUM_REQUESTS):
        # The first token of its own sets each apart within the block after the shared ones.
        own = [3 + number, *(source.randrange(3, 512) for _ in range(number))]
        sampling = {"temperature": 1.0, "seed": number} if number % 2 else {}
        asks.append(Ask([*shared, *own], {"max_tokens": 6, **sampling}))

    results = stack.generate_at_once([(ask.prompt, ask.sampling) for ask in asks])

    assert [result.token_ids for result in results] == oracle.answers(asks)
    assert [result.attempts for result in results] == [1] * NUM_REQUESTS
    cached = sorted(result.finished.usage.num_cached_tokens for result in results)
    num_shared_tokens = NUM_SHARED_BLOCKS * BLOCK_SIZE
    assert cached == [0] + [num_shared_tokens] * (NUM_REQUESTS - 1)
    num_own_tokens = sum(len(ask.prompt) - num_shared_tokens for ask in asks)
    num_own_full = sum(len(ask.prompt) // BLOCK_SIZE - NUM_SHARED_BLOCKS for ask in asks)
    computed = stack.state("p0").counters
    assert computed.num_computed_blocks == NUM_SHARED_BLOCKS + num_own_full
    assert computed.num_computed_prompt_tokens == num_shared_tokens + num_own_tokens
    assert computed.num_cached_prompt_tokens == num_shared_tokens * (NUM_REQUESTS - 1)
    num_tails = sum(len(ask.prompt) % BLOCK_SIZE > 0 for ask in asks)
    pulled = stack.state("d0").counters
    assert pulled.num_pulled_blocks == NUM_SHARED_BLOCKS + num_own_full + num_tails
    assert pulled.num_computed_prompt_tokens == 0
    stack.assert_idle()
