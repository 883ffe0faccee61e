"""Two engine loops, wired to each other by a network that Hypothesis drives.

Whatever is delayed, lost, cancelled, corrupted or killed, and in whatever order: blocks are
counted exactly after every step; in the end everything is free on both workers, and every token
that was ever sent is the one that an undisturbed run draws.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from baton.services.worker import messages as msg
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.kv.sequence import FinishReason, Sequence
from baton.shared.rpc.errors import DeadlineExceeded, DigestMismatch
from baton.shared.sampling import SamplingParams
from tests.unit.worker.conftest import MakeRunner
from tests.unit.worker.drafting import DraftingRunner, Planned
from tests.unit.worker.late_runner import LateRunner
from tests.unit.worker.network import Clock, Network
from tests.unit.worker.simulation import Cluster

NUM_BLOCKS = 12
BASE = tuple(3 + 7 * i % 50 for i in range(16))
GREEDY = SamplingParams(temperature=0.0, max_tokens=5)
SAMPLED = SamplingParams(temperature=1.0, seed=5, max_tokens=9, ignore_eos=True)
PARAMS = [
    GREEDY,
    SamplingParams(temperature=0.0, max_tokens=1),
    SamplingParams(temperature=0.0, max_tokens=2),
    SAMPLED,
]

Prompt = tuple[int, ...]

prompts = st.builds(
    lambda shared, own, which: BASE[:shared] + tuple(range(30 + which, 30 + which + own)),
    shared=st.sampled_from([0, 4, 8, 12, 16]),
    own=st.integers(1, 9),
    which=st.integers(0, 1),
)
KINDS_OF_CHANNELS = ["call", "starts", "first", "tokens", "hold"]
indices = st.integers(0, 1000)
names = st.sampled_from(["prefill", "decode"])


class Oracle:
    """What undisturbed runs answer."""

    def __init__(self, runner: ModelRunner) -> None:
        self._loop = PlainLoop(runner)
        self._answers: dict[tuple[Prompt, SamplingParams], list[int]] = {}

    def answer(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        known = self._answers.get((prompt, params))
        if known is None:
            [known] = self._loop.generate([prompt], [params])
            self._answers[prompt, params] = known
        return known

    def stopping(self, prompt: Prompt, params: SamplingParams, index: int) -> SamplingParams:
        """With the token at `index`, if the answer goes so far, as a stop token."""
        stops = self.answer(prompt, params)[index : index + 1]
        return replace(params, stop_token_ids=frozenset(stops))


def drafting_runner(runner: Any, oracle: Oracle) -> DraftingRunner:
    """Its worker's drafts: two right ones, a wrong one, ..."""

    def guess(sequence: Sequence, most: int) -> list[int]:
        answer = oracle.answer(sequence.client_prompt_token_ids, sequence.params)
        index = sequence.next_index
        coming = answer[index : index + most]
        return [
            token_id if (index + ahead) % 3 else (token_id + 1) % 61
            for ahead, token_id in enumerate(coming)
        ]

    return DraftingRunner(runner, Planned(guess))


class ProtocolMachine(RuleBasedStateMachine):
    runners: dict[str, ModelRunner]
    oracle: Oracle
    clock: Clock

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster(self.runners, self.clock)

    @rule(
        prompt=prompts,
        params=st.sampled_from(PARAMS),
        stop=st.sampled_from([None, None, 0, 1]),
        is_local=st.sampled_from([False, False, False, True]),
        time_left_s=st.sampled_from([None, None, 3.0]),
    )
    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        stop: int | None,
        is_local: bool,
        time_left_s: float | None,
    ) -> None:
        if stop is not None:
            params = self.oracle.stopping(prompt, params, stop)
        self.cluster.submit(
            prompt,
            params,
            self.oracle.answer(prompt, params),
            is_local=is_local,
            time_left_s=time_left_s,
        )

    @precondition(lambda self: self.cluster.network.busy_channels)
    @rule(index=indices, num_messages=st.integers(1, 4))
    def deliver(self, index: int, num_messages: int) -> None:
        channels = self.cluster.network.busy_channels
        channel = channels[index % len(channels)]
        for _ in range(num_messages):
            if self.cluster.network.channels[channel]:
                self.cluster.network.deliver(channel)

    @rule(name=names)
    def step(self, name: str) -> None:
        self.cluster.network.step(name)

    @rule(num_rounds=st.integers(1, 4), slow=st.sampled_from([None, *KINDS_OF_CHANNELS]))
    def go_on(self, num_rounds: int, slow: str | None) -> None:
        """All is well for a while, but that some messages are slow; pulls take longer than anything
        else."""
        for _ in range(num_rounds):
            for channel in self.cluster.network.busy_channels:
                if channel[0] != slow:
                    self.cluster.network.deliver(channel)
            for name in self.cluster.network.workers:
                self.cluster.network.step(name)

    @precondition(lambda self: self.cluster.network.workers["decode"].jobs)
    @rule(corrupt=st.sampled_from([False, False, False, True]))
    def finish_pull(self, corrupt: bool) -> None:
        self.cluster.network.finish_pull("decode", corrupt=corrupt)

    @rule(index=indices)
    def corrupt_source(self, index: int) -> None:
        self.cluster.network.corrupt_sealed("prefill", index)

    @precondition(lambda self: self.cluster.requests)
    @rule(index=indices)
    def cancel(self, index: int) -> None:
        self.cluster.cancel(self.cluster.requests[index % len(self.cluster.requests)])

    @precondition(lambda self: self.cluster.network.holds)
    @rule()
    def break_hold(self) -> None:
        self.cluster.network.break_hold(next(iter(self.cluster.network.holds.values())))

    @rule()
    def break_gateway_stream(self) -> None:
        self.cluster.network.break_gateway_stream("decode")

    @rule(name=names)
    def kill(self, name: str) -> None:
        self.cluster.network.kill(name)

    @rule(seconds=st.sampled_from([0.1, 2.5, 6.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def blocks_are_counted_exactly(self) -> None:
        self.cluster.network.check()

    def teardown(self) -> None:
        self.cluster.settle()
        for request in self.cluster.requests:
            if isinstance(request.outcome, FinishReason):
                assert request.token_ids == request.expected
            else:
                assert isinstance(request.outcome, str | DeadlineExceeded)


@pytest.fixture(scope="module")
def runners(make_runner: MakeRunner) -> dict[str, ModelRunner]:
    return {name: make_runner(NUM_BLOCKS) for name in ("prefill", "decode")}


@pytest.fixture(scope="module")
def oracle(make_runner: MakeRunner) -> Oracle:
    return Oracle(make_runner(NUM_BLOCKS))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("engine_loop", "handoff"):
        monkeypatch.setattr(f"baton.services.worker.{module}.time", clock)
    return clock


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_any_interleaving(
    runs_ahead: bool, runners: dict[str, ModelRunner], oracle: Oracle, clock: Clock
) -> None:
    late: dict[str, Any] = {name: LateRunner(runner) for name, runner in runners.items()}
    _run(late if runs_ahead else runners, oracle, clock)


@pytest.mark.parametrize(
    ("kind", "num_blocks", "cache"),
    [("windowed", 12, "auto"), ("one pool", 24, "fp8"), ("two pools", 14, "auto")],
)
def test_any_interleaving_of_several_cache_groups(
    kind: str, num_blocks: int, cache: str, make_runner: MakeRunner, clock: Clock
) -> None:
    """Blocks that windows gave back, prefixes with gaps, pools that run out one before the other:
    split equals together all the same, also where keys and values are kept in 8 bits."""
    runners = {
        name: LateRunner(make_runner(num_blocks, kind, kv_cache_dtype=cache))
        for name in ("prefill", "decode")
    }
    oracle = Oracle(make_runner(64, kind, kv_cache_dtype=cache))
    _run(runners, oracle, clock, max_examples=40)


@pytest.mark.parametrize(("kind", "runs_ahead"), [("states", True), ("states alone", False)])
def test_any_interleaving_of_models_that_keep_states(
    kind: str, runs_ahead: bool, make_runner: MakeRunner, clock: Clock
) -> None:
    """Slots that run out before blocks do, and the other way round; a state that is lost is
    computed from the prompt's beginning, and no token is applied to it twice."""
    made = {
        name: make_runner(NUM_BLOCKS, kind, max_num_seqs=2, state_checkpoints=2)
        for name in ("prefill", "decode")
    }
    runners: dict[str, Any] = {name: LateRunner(runner) for name, runner in made.items()}
    oracle = Oracle(make_runner(NUM_BLOCKS, kind))
    _run(runners if runs_ahead else made, oracle, clock, max_examples=30)


@pytest.mark.parametrize(("kind", "num_blocks"), [("full", NUM_BLOCKS), ("two pools", 14)])
def test_any_interleaving_with_drafts(
    kind: str, num_blocks: int, make_runner: MakeRunner, clock: Clock
) -> None:
    """The answer is the one without drafts, whatever of them was wrong."""
    oracle = Oracle(make_runner(64, kind))
    drafting: dict[str, Any] = {}
    for name in ("prefill", "decode"):
        runner: Any = make_runner(num_blocks, kind, num_drafts=3)
        # Of several groups with a step ahead.
        drafting[name] = drafting_runner(runner if kind == "full" else LateRunner(runner), oracle)
    _run(drafting, oracle, clock, max_examples=40)


def _run(runners: dict[str, Any], oracle: Oracle, clock: Clock, max_examples: int = 80) -> None:
    class Machine(ProtocolMachine):
        pass

    Machine.runners = runners
    Machine.oracle, Machine.clock = oracle, clock
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=60,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("stop", [0, 1])
@pytest.mark.parametrize("slow", KINDS_OF_CHANNELS)
def test_what_overtakes_what_costs_no_attempt(
    slow: str, stop: int, runners: dict[str, ModelRunner], oracle: Oracle, clock: Clock
) -> None:
    """A stop token that comes first ends the sequence on the prefill worker, and its claim with it.
    Of that the gateway may hear from the decode worker before it hears of the token."""
    cluster, prompt = Cluster(runners, clock), BASE[:9]
    params = oracle.stopping(prompt, SAMPLED, stop)
    request = cluster.submit(prompt, params, oracle.answer(prompt, params))
    for _ in range(20):
        _exchange(cluster.network, slow)
        cluster.network.step("prefill")
    cluster.settle()
    assert (request.outcome, request.num_attempts) == (FinishReason.STOP, 1)
    assert len(request.token_ids) == stop + 1


@pytest.mark.parametrize("has_token", [False, True])
def test_the_gateway_learns_why_the_source_ended(
    has_token: bool, runners: dict[str, ModelRunner], oracle: Oracle, clock: Clock
) -> None:
    """Before the first token the source says it; afterwards nobody but its reader listens to it."""
    cluster, prompt = Cluster(runners, clock), BASE[:9]
    network, prefill = cluster.network, cluster.network.workers["prefill"]
    request = cluster.submit(prompt, GREEDY, oracle.answer(prompt, GREEDY))
    _exchange(network)
    while has_token and not request.token_ids:
        network.step("prefill")
        for channel in network.busy_channels:
            if channel[0] == "first":
                network.deliver(channel)
    prefill.inbox.put(msg.FailAll(DigestMismatch("a block went bad")))
    network.step("prefill")
    _exchange(network, "first")
    cluster.settle()
    assert request.num_attempts == 2 and request.distrust
    assert request.token_ids == request.expected


def test_what_was_computed_from_a_bad_block_is_found_nowhere(
    make_runner: MakeRunner, clock: Clock
) -> None:
    """The reader has good copies of the block that goes bad at its source. What the source computed
    from it afterwards it copies as it was sealed, and wrong: that is noticed at the prompt's end.
    """
    cluster = Cluster({name: make_runner(40) for name in ("prefill", "decode")}, clock)
    network, prefill = cluster.network, cluster.network.workers["prefill"]
    prompt, params = tuple(3 + 7 * i % 50 for i in range(25)), replace(GREEDY, ignore_eos=True)
    expected = Oracle(make_runner(64)).answer(prompt, params)
    request = cluster.submit(prompt, params, expected)
    sequences = prefill.engine._table.all()
    while not sequences or not sequences[0].num_computed_tokens:
        _exchange(network)
        network.step("prefill")
        sequences = prefill.engine._table.all()
    assert sequences[0].num_computed_tokens == 8, "and most is to come"
    _exchange(network)
    assert (
        prefill.counters["digest_mismatches"] == 0
        and network.workers["decode"].counters["pulled_blocks"]
    )
    network.corrupt_sealed("prefill", -1)
    while request.num_attempts == 1:
        network.step("prefill")
        _exchange(network)
    assert prefill.counters["digest_mismatches"] == 1
    cluster.settle()
    assert (request.outcome, request.token_ids) == (FinishReason.LENGTH, expected)


def _exchange(network: Network, slow: str | None = None) -> None:
    """All that is under way arrives, but for `slow` kinds of channels, and the reader reads what it
    was told of."""
    for _ in range(6):
        for channel in network.busy_channels:
            while channel[0] != slow and network.channels.get(channel):
                network.deliver(channel)
        network.finish_pull("decode")
        network.step("decode")
