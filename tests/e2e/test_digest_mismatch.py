"""A block whose bytes are not those that were sealed: counted, logged, never served."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.harness import Result, Stack
from tests.e2e.oracle import Ask, Oracle

pytestmark = pytest.mark.e2e

NUM_READER_BLOCKS = 32


@dataclass(frozen=True)
class Fault:
    """`found_by`: the worker that is to notice `num_mismatches` bad blocks first."""

    producer: str
    num_chunks: int
    num_mismatches: int
    found_by: str = "d0"
    reader: str = ""


FAULTS = {
    "swapped": Fault("swap_sealed_blocks", num_chunks=1, num_mismatches=2),
    # Slow steps: the reader notices while later chunks, built upon the bad block, still compute.
    "corrupted_while_computing": Fault(
        "corrupt_sealed_block,slow_steps", num_chunks=15, num_mismatches=1
    ),
    # Slow pulls: the reader would notice only after a first token drawn from the bad block. Three
    # chunks, because on a GPU the second has been launched when the first is sealed: it may have
    # read the block by then.
    "corrupted_before_first_token": Fault(
        "corrupt_own_block", num_chunks=3, num_mismatches=1, found_by="p0", reader="slow_pulls"
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
        failpoints={"p0": fault.producer, "d0": fault.reader},
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
    finder = stack.state(fault.found_by).counters
    assert finder.num_digest_mismatches == fault.num_mismatches
    assert_logged(stack, fault)
    # The first block was bad and all others descend from it: the producer kept none of them.
    assert num_tokens_computed(stack, disturbed, attempt=2) >= len(prompt)
    before = stack.state("p0").counters, stack.state("d0").counters

    evict_everything_from_reader(stack, oracle)
    num_pulled = stack.state("d0").counters.num_pulled_blocks
    again = stack.generate(ask.prompt, **ask.sampling)

    assert again.token_ids == expected
    assert again.attempts == 1
    assert again.finished.usage.num_cached_tokens == 224, "the producer cached what it recomputed"
    after = stack.state("p0").counters, stack.state("d0").counters
    assert after[1].num_pulled_blocks == num_pulled + 15, "all were read from the producer"
    num_mismatches = [each.num_digest_mismatches for each in after]
    assert num_mismatches == [each.num_digest_mismatches for each in before]
    stack.wait_until(lambda: stack.status().counters.num_digest_mismatches == sum(num_mismatches))
    assert stack.status().counters.num_extra_attempts == 1
    stack.assert_idle()


def evict_everything_from_reader(stack: Stack, oracle: Oracle) -> None:
    """By a prompt that needs the whole of its small pool."""
    source = random.Random(2)
    prompt = [source.randrange(3, 512) for _ in range((NUM_READER_BLOCKS - 1) * 16)]
    flood = Ask(prompt, {"max_tokens": 16})
    assert stack.generate(flood.prompt, **flood.sampling).token_ids == oracle.answer(flood)


def num_tokens_computed(stack: Stack, result: Result, *, attempt: int) -> int:
    """By the producer."""
    return sum(
        int(str(event["num_tokens"]))
        for event in stack.trace("p0")
        if event["event"] == "chunk" and event["key"] == f"{result.request_id}/0#{attempt}"
    )


def assert_logged(stack: Stack, fault: Fault) -> None:
    """The reader names source and copy of every bad block, the producer its own bad blocks."""
    if fault.found_by == "d0":
        lines = stack.processes["d0"].log.read_text().splitlines()
        mismatches = [line for line in lines if "digest mismatch" in line]
        assert len(mismatches) == fault.num_mismatches
        for line in mismatches:
            assert re.search(
                r"request_id=\S+ attempt=1 .*source=p0 source_block=\d+ .*copy_block=\d+", line
            )
    log = stack.processes["p0"].log.read_text()
    [fired] = re.findall(r'failpoint fired failpoint=\w+ blocks="?\[(.*)\]', log)
    dropped = re.findall(r"own block is corrupt, dropped group=0 block=(\d+)", log)
    assert sorted(dropped) == sorted(fired.split(", "))
