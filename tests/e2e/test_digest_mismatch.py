"""A block whose bytes are not those that were sealed: counted, logged, never served."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.harness import Stack
from tests.e2e.oracle import Ask, Oracle

pytestmark = pytest.mark.e2e

NUM_READER_BLOCKS = 32


@dataclass(frozen=True)
class Fault:
    failpoints: str
    num_chunks: int
    num_mismatches: int


FAULTS = {
    "corrupted": Fault("corrupt_sealed_block", num_chunks=1, num_mismatches=1),
    "swapped": Fault("swap_sealed_blocks", num_chunks=1, num_mismatches=2),
    # Steps are slow, so that the mismatch is found while later chunks still compute.
    "corrupted_while_computing": Fault(
        "corrupt_sealed_block,slow_steps", num_chunks=6, num_mismatches=1
    ),
}


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest) -> Fault:
    return FAULTS[request.param]


@pytest.fixture
def stack(fault: Fault, tiny_model: Path, tmp_path: Path) -> Iterator[Stack]:
    budget = 240 // fault.num_chunks
    with Stack(
        tiny_model,
        tmp_path,
        {"p0": "prefill", "d0": "decode"},
        worker_flags={
            "p0": ["--token-budget", str(budget)],
            "d0": ["--num-blocks", str(NUM_READER_BLOCKS)],
        },
        failpoints={"p0": fault.failpoints},
    ) as stack:
        yield stack


def test_mismatch_is_computed_anew(fault: Fault, stack: Stack, oracle: Oracle) -> None:
    source = random.Random(1)
    prompt = [source.randrange(3, 512) for _ in range(230)]
    ask = Ask(prompt, {"temperature": 1.0, "seed": 4, "max_tokens": 20})
    expected = oracle.answer(ask)

    disturbed = stack.generate(ask.prompt, **ask.sampling)

    assert disturbed.token_ids == expected
    assert disturbed.attempts == 2
    reader = stack.state("d0").counters
    assert reader.num_digest_mismatches == fault.num_mismatches
    assert_logged_at_both_ends(stack, fault)
    # The first block was bad and all others descend from it: the producer kept none of them.
    num_computed = stack.state("p0").counters.num_computed_blocks
    assert disturbed.finished.usage.num_cached_tokens == 0
    assert num_computed >= 14 + (14 if fault.num_chunks == 1 else 1)

    evict_everything_from_reader(stack, oracle)
    again = stack.generate(ask.prompt, **ask.sampling)

    assert again.token_ids == expected
    assert again.attempts == 1
    assert again.finished.usage.num_cached_tokens == 224, "the producer cached what it recomputed"
    pulled = stack.state("d0").counters.num_pulled_blocks - reader.num_pulled_blocks
    assert pulled == 15 + NUM_READER_BLOCKS - 1, "the producer's blocks were read and verified"
    assert stack.state("d0").counters.num_digest_mismatches == fault.num_mismatches
    assert_in_status(stack, fault)
    stack.assert_idle()


def evict_everything_from_reader(stack: Stack, oracle: Oracle) -> None:
    """By a prompt that needs the whole of its small pool."""
    source = random.Random(2)
    prompt = [source.randrange(3, 512) for _ in range((NUM_READER_BLOCKS - 1) * 16)]
    flood = Ask(prompt, {"max_tokens": 16})
    assert stack.generate(flood.prompt, **flood.sampling).token_ids == oracle.answer(flood)


def assert_logged_at_both_ends(stack: Stack, fault: Fault) -> None:
    """The reader names source and copy of every bad block, the producer its own bad blocks."""
    lines = stack.processes["d0"].log.read_text().splitlines()
    mismatches = [line for line in lines if "digest mismatch" in line]
    assert len(mismatches) == fault.num_mismatches
    for line in mismatches:
        assert "source p0 block " in line and "copy in block " in line
    lines = stack.processes["p0"].log.read_text().splitlines()
    [dropped] = [line for line in lines if "digest mismatch" in line]
    [fired] = [line for line in lines if "fired on blocks" in line]
    assert fired.rpartition("blocks ")[2] in dropped


def assert_in_status(stack: Stack, fault: Fault) -> None:
    def is_told() -> bool:
        counters = stack.status().counters
        return counters.num_digest_mismatches == fault.num_mismatches

    stack.wait_until(is_told)
    assert stack.status().counters.num_extra_attempts == 1
