"""Sums of blocks that are started behind the step that fills them, with a step in flight."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import pytest

from baton.services.worker import messages as msg
from baton.shared.engine.block_sums import BlockSums, HostBlockSums, TakeSums, Writes
from baton.shared.kv.digest import Uint64Array
from baton.shared.kv.sequence import Sequence
from baton.shared.rpc.errors import DigestMismatch
from tests.unit.worker.conftest import BLOCK_SIZE, MakeRunner
from tests.unit.worker.test_steps_ahead import BAD_SEED, NUM_BLOCKS, Bench, sampling

PROMPT = tuple(3 + i * 7 % 50 for i in range(38))
"""Chunks of 16, 16 and 6 tokens: nine full blocks, and a tail."""


class StartedSums:
    """Refuses to be asked for what a step that is not over may still write to."""

    def __init__(self, sums: HostBlockSums, log: list[str]) -> None:
        self._sums = sums
        self._log = log
        self.started: list[list[int]] = []
        self.taken: list[list[int]] = []
        self.made_at_once: list[list[int]] = []

    def __call__(self, block_ids: Seq[int], group: int = 0) -> Uint64Array:
        self.made_at_once.append(list(block_ids))
        return self._sums(block_ids, group)

    def start(
        self, block_ids: Seq[int], group: int = 0, *, behind: Writes | None = None
    ) -> TakeSums:
        ids, number = list(block_ids), self._log.count("launch")
        self.started.append(ids)

        def take() -> Uint64Array:
            assert self._log.count("result") >= number, "the step is still in flight"
            self.taken.append(ids)
            return self._sums(ids, group)

        return take


class SumsBench(Bench):
    def __init__(self, make_runner: MakeRunner) -> None:
        runner = make_runner(NUM_BLOCKS)
        super().__init__(runner)
        self.cache = runner.kv_cache
        self.right = HostBlockSums(self.cache)
        self.sums = StartedSums(self.right, self.runner.log)
        self.use(self.sums)

    def use(self, sums: BlockSums) -> None:
        self.engine._sealer._block_sums = sums

    def start_prompt(self, seed: int = 1, max_tokens: int = 4) -> Sequence:
        return self.start(0, PROMPT, sampling(seed, max_tokens))

    def check_digests(self, block_ids: Seq[int]) -> None:
        """Those of the pool are those of the bytes."""
        found = self.engine._sealer.digests_of_sums(0, block_ids, self.right(block_ids))
        pool = self.pools.of(0)
        assert [pool.block(block_id).digest for block_id in block_ids] == found


@pytest.fixture
def bench(make_runner: MakeRunner) -> SumsBench:
    return SumsBench(make_runner)


def test_a_prompt_is_sealed_and_checked_with_sums_that_were_started(bench: SumsBench) -> None:
    sequence = bench.start_prompt()
    bench.step()
    table = list(sequence.block_tables[0])
    while not bench.tokens[0]:
        bench.step()
    sums = bench.sums
    assert sums.started == [table[:4], table[4:8], table[:9]]
    assert sums.taken == sums.started and not sums.made_at_once
    bench.check_digests(table[:9])
    bench.run()
    assert len(bench.tokens[0]) == 4


def test_a_block_spoiled_under_the_last_step_is_found_before_a_token_leaves(
    bench: SumsBench,
) -> None:
    sequence = bench.start_prompt()
    while len(bench.sums.started) < 3:
        bench.step()
    assert sequence.num_steps_in_flight == 1 and not bench.tokens[0]
    bench.cache.tensors[0][sequence.block_tables[0][2]].add_(1.0)
    bench.run()
    assert isinstance(bench.failures[0], DigestMismatch)
    assert not bench.tokens[0]
    assert bench.engine._counters["digest_mismatches"] == 1


def test_all_chunks_of_a_step_are_started_at_once(bench: SumsBench) -> None:
    first = bench.start(0, PROMPT[:9], sampling(1, 2))
    second = bench.start(1, PROMPT[9:14], sampling(2, 2))
    bench.step()
    tables = [list(sequence.block_tables[0]) for sequence in (first, second)]
    # The shorter prompt's chunk is the step's first.
    assert bench.sums.started == [tables[1][:1] + tables[0][:2]]
    while not (bench.tokens[0] and bench.tokens[1]):
        bench.step()
    assert bench.sums.taken == bench.sums.started and not bench.sums.made_at_once
    bench.check_digests([*tables[0][:2], tables[1][0]])


def test_a_cached_block_that_is_spoiled_ends_only_whose_prompt_has_it(bench: SumsBench) -> None:
    prompts = PROMPT[:9], PROMPT[9:18]
    for number, prompt in enumerate(prompts):
        bench.start(number, prompt, sampling(number, 1))
    bench.run()
    launches = bench.runner.log.count("launch")
    first, second = (
        bench.start(number + 2, (*prompt, 7), sampling(number, 2))
        for number, prompt in enumerate(prompts)
    )
    while bench.runner.log.count("launch") == launches:
        bench.step()
    assert first.num_cached_tokens == second.num_cached_tokens == 8
    bench.cache.tensors[0][first.block_tables[0][1]].add_(1.0)
    bench.run()
    assert isinstance(bench.failures[2], DigestMismatch) and not bench.tokens[2]
    assert len(bench.tokens[3]) == 2 and 3 not in bench.failures


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_sums_of_a_sequence_that_was_cancelled_are_nobodys(
    bench: SumsBench, num_steps: int
) -> None:
    sequence = bench.start_prompt()
    for _ in range(num_steps):
        bench.step()
    taken = len(bench.sums.taken)
    bench.engine._handle(msg.CancelAttempts(sequence.key))
    bench.run()
    assert len(bench.sums.taken) == taken < len(bench.sums.started)
    assert not bench.tokens[0]
    again = bench.start(1, PROMPT, sampling(2, 2))
    bench.run()
    assert len(bench.tokens[1]) == 2 and again.finish_reason is not None


def test_a_step_that_could_not_be_launched_is_sealed_with_sums_made_afterwards(
    bench: SumsBench,
) -> None:
    """The rows of the step are computed one by one when its result is taken."""
    bench.runner.bad_from = 32
    sequence = bench.start_prompt(seed=BAD_SEED)
    other = bench.start(1, PROMPT[::-1], sampling(3, 2))
    bench.run()
    assert 0 in bench.failures and "refused" in bench.runner.log
    assert len(bench.tokens[1]) == 2 and other.finish_reason is not None
    assert not sequence.block_tables
    found, prompt = bench.pools.prefix_cache, other.prompt_token_ids
    assert found.match(other.block_hashes, prompt) == len(PROMPT) // BLOCK_SIZE
    bench.check_digests([found.find(each, 0, prompt) for each in other.block_hashes])


def test_the_host_sums_what_the_step_has_left(bench: SumsBench) -> None:
    bench.use(bench.right)
    sequence = bench.start_prompt(max_tokens=1)
    bench.step()
    table = list(sequence.block_tables[0])
    bench.run()
    assert len(bench.tokens[0]) == 1 and not bench.failures
    bench.check_digests(table[:9])
