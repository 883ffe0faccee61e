"""Layers that keep a state: a slot for each sequence, handed over when its prompt is computed, and
computed anew from the beginning when it is lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from baton.services.worker import messages as msg
from baton.services.worker.sequence_table import Recipient
from baton.services.worker.stepper import BatchLimits
from baton.shared.engine.batch import Batch
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.kv.sequence import AttemptKey, FinishReason, Sequence, SequenceState
from baton.shared.rpc.errors import EngineFailure, Preempted
from baton.shared.sampling import SamplingParams
from tests.unit.worker.conftest import BLOCK_SIZE, MakeRunner
from tests.unit.worker.late_runner import LateRunner
from tests.unit.worker.network import Clock
from tests.unit.worker.sim_worker import SimWorker
from tests.unit.worker.simulation import Cluster
from tests.unit.worker.test_steps_ahead import BAD_SEED, Bench, FlakyRunner, sampling
from tests.unit.worker.test_windows import OneWorker

PROMPT = tuple(3 + 7 * i % 50 for i in range(26))
OTHER = tuple(5 + 11 * i % 50 for i in range(21))
ANSWER = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
KINDS = ("states", "states alone")


def state_group(runner: ModelRunner) -> int:
    [group] = [number for number, each in enumerate(runner.groups) if not each.spec.grows]
    return group


def answers(make_runner: MakeRunner, kind: str, *prompts: tuple[int, ...]) -> list[list[int]]:
    loop = PlainLoop(make_runner(128, kind))
    return [loop.generate([prompt], [ANSWER])[0] for prompt in prompts]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("engine_loop", "handoff"):
        monkeypatch.setattr(f"baton.services.worker.{module}.time", clock)
    return clock


# What a sequence holds


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_sequence_holds_one_slot(
    kind: str, runs_ahead: bool, make_runner: MakeRunner
) -> None:
    """And no block where no layer has any: it never waits for one."""
    long = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    [expected] = PlainLoop(make_runner(128, kind)).generate([PROMPT * 4], [long])
    runner = make_runner(64, kind, max_num_seqs=1)
    worker = OneWorker(LateRunner(runner) if runs_ahead else runner)  # type: ignore[arg-type]
    worker.run_until_idle(worker.start(PROMPT * 4, long))
    assert worker.token_ids == expected and worker.failures == []
    group = state_group(runner)
    assert worker.most_held[group] == runner.num_blocks[group] == 1
    assert sum(worker.most_held) == 1 + (kind == "states") * -(-(4 * 26 + 99) // BLOCK_SIZE)


def test_32k_tokens_hold_a_slot_and_no_block(make_runner: MakeRunner) -> None:
    """Where layers keep nothing but states; two slots hold checkpoints of it, one after another."""
    runner = make_runner(1, "states alone, long", max_num_seqs=1, state_checkpoints=2)
    limits = BatchLimits(token_budget=2048, max_num_seqs=1)
    worker = SimWorker("w", "ab" * 16, runner, lambda _, mail: None, limits)
    prompt = PROMPT * 1260
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    sequence = Sequence(AttemptKey("r", 0, 1), prompt, params)
    assert 32_000 < len(prompt) + 5 <= runner.max_model_len
    worker.inbox.put(msg.StartDecode(sequence, Recipient("g", 1), None))
    held = set()
    while sequence.state is not SequenceState.FINISHED:
        worker.engine.run_once(may_wait=False)
        held.add(tuple(len(table) for table in sequence.block_tables))
        worker.check()
    assert held == {(1,), ()} and len(sequence.output_token_ids) == 5
    assert worker.pools.capacity.num_blocks == (3,) and worker.pools.num_free == [3]
    assert worker.counters["preemptions"] == 0
    assert worker.pools.num_checkpoints == 2


# The hand-off


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_is_handed_over_behind_the_blocks(
    kind: str, make_runner: MakeRunner, clock: Clock
) -> None:
    """Each time; of the blocks only what the reader lacks, though their owner computes them all."""
    [expected] = answers(make_runner, kind, PROMPT)
    runners = {name: make_runner(40, kind) for name in ("prefill", "decode")}
    cluster = Cluster(runners, clock)
    workers = cluster.network.workers
    whole = -(-len(PROMPT) // BLOCK_SIZE) if kind == "states" else 0
    slot_bytes = runners["decode"].kv_cache.pools[-1].block_bytes
    for number_pulled in (whole, whole and 1):
        before = dict(workers["decode"].counters)
        request = cluster.submit(PROMPT, ANSWER, expected)
        cluster.settle()
        assert request.token_ids == expected and request.num_attempts == 1
        counters = workers["decode"].counters
        assert counters["pulled_blocks"] - before.get("pulled_blocks", 0) == number_pulled + 1
        pulled_bytes = counters["pulled_bytes"] - before.get("pulled_bytes", 0)
        block_bytes = runners["decode"].kv_cache.pools[0].block_bytes
        assert pulled_bytes == number_pulled * block_bytes + slot_bytes
    counters = workers["prefill"].counters
    assert (counters["cached_prompt_tokens"], counters["computed_prompt_tokens"]) == (0, 52)


def test_one_that_yields_comes_again_with_a_state_from_its_beginning(
    make_runner: MakeRunner, clock: Clock
) -> None:
    """Either has room enough alone, in the end, and both at first."""
    long = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    prompts = (PROMPT, OTHER)
    loop = PlainLoop(make_runner(128, "states"))
    expected = [loop.generate([prompt], [long])[0] for prompt in prompts]
    few = -(-(len(PROMPT) + 60) // BLOCK_SIZE) + 1
    runners = {"prefill": make_runner(40, "states"), "decode": make_runner(few, "states")}
    cluster = Cluster(runners, clock)
    requests = [
        cluster.submit(prompt, long, answer)
        for prompt, answer in zip(prompts, expected, strict=True)
    ]
    cluster.settle()
    assert [request.token_ids for request in requests] == expected
    assert sorted(request.num_attempts for request in requests) == [1, 2]
    assert cluster.network.workers["decode"].counters["preemptions"] == 1


def swap(slots: torch.Tensor, mine: int, other: int, earlier: torch.Tensor) -> None:
    slots[[mine, other]] = slots[[other, mine]]


def make_stale(slots: torch.Tensor, mine: int, other: int, earlier: torch.Tensor) -> None:
    slots[mine] = earlier


def corrupt(slots: torch.Tensor, mine: int, other: int, earlier: torch.Tensor) -> None:
    slots[mine, 0, 1, 3] ^= 1


@pytest.mark.parametrize(("tamper", "num_wrong"), [(swap, 2), (make_stale, 1), (corrupt, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_another_state_than_was_announced_is_noticed(
    kind: str,
    tamper: Callable[[torch.Tensor, int, int, torch.Tensor], None],
    num_wrong: int,
    make_runner: MakeRunner,
    clock: Clock,
) -> None:
    """Swapped with another sequence's, one of its own of a chunk before, or with a bit turned: it
    is computed anew."""
    prompts = PROMPT, OTHER
    expected = answers(make_runner, kind, *prompts)
    runners = {name: make_runner(40, kind) for name in ("prefill", "decode")}
    cluster = Cluster(runners, clock)
    network, group = cluster.network, state_group(runners["prefill"])
    requests = [
        cluster.submit(*each) for each in zip(prompts, (ANSWER,) * 2, expected, strict=True)
    ]
    owner, slots = network.workers["prefill"], runners["prefill"].kv_cache.tensors[group]
    earlier = slots[:0]
    sequences: list[Sequence] = []
    while not sequences or any(s.state is not SequenceState.TRANSFERRING for s in sequences):
        for channel in network.busy_channels:
            network.deliver(channel)
        for name in network.workers:
            network.step(name)
        sequences = owner.engine._table.all()
        if not len(earlier) and sequences and sequences[0].num_computed_tokens:
            earlier = slots[sequences[0].block_tables[group][0]].clone()
    mine, other = [sequence.block_tables[group][0] for sequence in sequences]
    tamper(slots, mine, other, earlier)
    number = runners["prefill"].arrangement.pools[group]
    network.corrupted |= {(owner.incarnation, number, slot) for slot in (mine, other)}
    cluster.settle()
    assert [request.token_ids for request in requests] == expected
    assert sum(request.num_attempts for request in requests) == 2 + num_wrong
    mismatches = [worker.counters["digest_mismatches"] for worker in network.workers.values()]
    assert sum(mismatches) == num_wrong


# A step that fails


class HalfwayRunner(FlakyRunner):
    """Its steps fail when all was computed: states and keys were written."""

    steps_ahead = 0

    def _refuse_bad(self, what: str, batch: Batch) -> None:
        try:
            super()._refuse_bad(what, batch)
        except RuntimeError:
            self.engine.forward(batch)
            raise


class HalfwayBench(Bench):
    make_flaky = HalfwayRunner


@pytest.mark.parametrize("kind", ["full", *KINDS])
def test_a_state_that_a_failed_step_may_have_changed_is_used_no_more(
    kind: str, make_runner: MakeRunner
) -> None:
    """Whoever made it fail is found all the same, and the others are told to begin anew."""
    asked = [sampling(1, 12), sampling(BAD_SEED, 12), sampling(3, 12)]
    prompts = [PROMPT[:5], PROMPT[5:9], PROMPT[9:14]]
    loop = PlainLoop(make_runner(24, kind))
    expected = [loop.generate([p], [a])[0] for p, a in zip(prompts, asked, strict=True)]
    bench = HalfwayBench(make_runner(24, kind))
    bench.runner.bad_from = len(prompts[1]) + 3
    for number, params in enumerate(asked):
        bench.start(number, prompts[number], params)
    bench.run()
    assert isinstance(bench.failures.pop(1), EngineFailure)
    if kind == "full":
        assert bench.tokens[0] == expected[0] and bench.tokens[2] == expected[2]
    else:
        assert [type(bench.failures.pop(number)) for number in (0, 2)] == [Preempted] * 2
    assert not bench.failures
    for number, tokens in bench.tokens.items():
        assert tokens and tokens == expected[number][: len(tokens)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_begins_with_no_state_is_computed_again(kind: str, make_runner: MakeRunner) -> None:
    """The first chunk of a prompt: whatever the slot holds by then, it begins with zeros."""
    asked = [sampling(1, 12), sampling(BAD_SEED, 12)]
    prompts = [PROMPT[:5], PROMPT[5:9]]
    [expected] = PlainLoop(make_runner(24, kind)).generate(prompts[:1], asked[:1])
    bench = HalfwayBench(make_runner(24, kind))
    bench.runner.bad_from = 0
    for number, params in enumerate(asked):
        bench.start(number, prompts[number], params)
    bench.run()
    assert isinstance(bench.failures.pop(1), EngineFailure) and not bench.failures
    assert (bench.tokens, bench.reasons) == ({0: expected}, {0: FinishReason.LENGTH})


def test_a_constrained_sequence_with_a_state_is_never_a_step_ahead(make_runner: MakeRunner) -> None:
    """A step whose mask comes too late is taken again: its token would be applied twice."""
    for kind, may_follow in (("full", True), ("states", False)):
        worker = OneWorker(LateRunner(make_runner(24, kind)))  # type: ignore[arg-type]
        assert worker.engine._stepper._masks_follow is may_follow
