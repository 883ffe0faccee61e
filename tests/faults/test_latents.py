"""Latents in the cache: split equals together, whatever fails."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Stack
from tests.e2e.oracle import Ask, Oracle
from tests.faults.streams import Background
from tests.unit.engine.tiny_latents import TINY_LATENTS
from tests.unit.engine.tiny_models import make_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.exact]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "deepseek"
    make_tiny(directory, "deepseek_v3", TINY_LATENTS["deepseek_v3"]["as they come"])
    return directory


@pytest.fixture
def stack(model: Path, tmp_path: Path) -> Iterator[Stack]:
    with Stack(
        model,
        tmp_path,
        {"p0": "prefill", "d0": "decode"},
        # Some sequences have to yield: about two fit.
        flags=["--num-blocks", "32", "--token-budget", "48", "--max-model-len", "320"],
        failpoints={"p0": "corrupt_sealed_block,swap_sealed_blocks"},
    ) as stack:
        yield stack


def test_split_equals_together(stack: Stack, model: Path) -> None:
    """Latents that are corrupted and swapped in the hand-off, a full pool, and a decode worker that
    is killed in mid-stream."""
    source = random.Random(5)
    asks = [
        Ask([source.randrange(3, 320) for _ in range(num_prompt)], {"max_tokens": 100})
        for num_prompt in (30, 190, 97)
    ]
    expected = Oracle(model).answers(asks)
    streams = [Background(stack, ask.prompt, ignore_eos=True, **ask.sampling) for ask in asks]
    stack.wait_until(lambda: sum(stream.num_tokens for stream in streams) > 60)
    killed = stack.state("d0")
    stack.kill("d0")
    stack.restart("d0")
    results = [stream.result() for stream in streams]
    assert [result.token_ids for result in results] == expected
    assert sum(result.attempts for result in results) > len(results)
    counters = [stack.state(name).counters for name in ("p0", "d0")]
    assert sum(each.num_digest_mismatches for each in (*counters, killed.counters)) >= 1
    stack.assert_idle()
