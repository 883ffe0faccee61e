"""Layers with a window: blocks behind it go, what is left is right, and no more is handed over."""

from __future__ import annotations

import pytest

from baton.services.worker import messages as msg
from baton.services.worker.sequence_table import Recipient
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.sampling import SamplingParams
from tests.unit.worker.conftest import BLOCK_SIZE, CONFIGS, MakeRunner
from tests.unit.worker.late_runner import LateRunner
from tests.unit.worker.network import Clock
from tests.unit.worker.sim_worker import SimWorker
from tests.unit.worker.simulation import Cluster

WINDOW: int = CONFIGS["two pools"]["sliding_window"]
TEN_WINDOWS = 10 * WINDOW
PROMPT = tuple(3 + 7 * i % 50 for i in range(TEN_WINDOWS))
ANSWER = SamplingParams(temperature=0.0, max_tokens=TEN_WINDOWS, ignore_eos=True)


class OneWorker(SimWorker):
    """Counts after every iteration the blocks that its sequence holds, by group."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__("w", "ab" * 16, runner, lambda _, mail: self._hear(mail))
        self.token_ids: list[int] = []
        self.failures: list[str] = []
        self.most_held = [0] * len(runner.groups)

    def start(self, prompt: tuple[int, ...], params: SamplingParams) -> Sequence:
        sequence = Sequence(AttemptKey(f"r{len(prompt)}", 0, 1), prompt, params)
        self.inbox.put(msg.StartDecode(sequence, Recipient(self.gateway_stream, 1), None))
        return sequence

    def run_until_idle(self, sequence: Sequence) -> None:
        for _ in range(400):
            self.engine.run_once(may_wait=False)
            self.check()
            held = [len(table) - table.count(NO_BLOCK) for table in sequence.block_tables]
            self.most_held = list(map(max, self.most_held, held or self.most_held))
        assert self.leftovers == {}

    def _hear(self, mail: list[msg.Outgoing]) -> None:
        for message in mail:
            if isinstance(message, msg.ToGateway):
                self.token_ids.extend(message.message.step.token_ids)
                if message.message.HasField("failed"):
                    self.failures.append(message.message.failed.failure.message)


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("kind", ["windowed", "one pool", "two pools"])
def test_blocks_in_use_stay_bounded_over_ten_windows(
    kind: str, runs_ahead: bool, make_runner: MakeRunner
) -> None:
    """Of a prompt that is computed in chunks, and of an answer; the tokens are those of a run in
    which nothing was given back."""
    [expected] = PlainLoop(make_runner(128, kind)).generate([PROMPT], [ANSWER])
    runner = make_runner(48, kind)
    worker = OneWorker(LateRunner(runner) if runs_ahead else runner)  # type: ignore[arg-type]
    worker.run_until_idle(worker.start(PROMPT, ANSWER))
    assert worker.token_ids == expected
    for group, share, most in zip(
        runner.groups, runner.capacity.groups, worker.most_held, strict=True
    ):
        if group.spec.reads_everything:
            assert most == -(-(2 * TEN_WINDOWS - 1) // BLOCK_SIZE)
        else:
            assert share.max_blocks is not None and 2 <= most <= share.max_blocks
            assert share.max_blocks * BLOCK_SIZE < TEN_WINDOWS


@pytest.mark.parametrize("kind", ["windowed", "two pools"])
def test_of_a_windowed_group_only_the_last_window_is_handed_over(
    kind: str, make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    for module in ("engine_loop", "handoff"):
        monkeypatch.setattr(f"baton.services.worker.{module}.time", clock)
    [expected] = PlainLoop(make_runner(128, kind)).generate([PROMPT], [ANSWER])
    runners = {name: make_runner(64, kind) for name in ("prefill", "decode")}
    cluster = Cluster(runners, clock)
    request = cluster.submit(PROMPT, ANSWER, expected)
    cluster.settle()
    assert request.token_ids == expected
    whole = len(PROMPT) // BLOCK_SIZE
    # Positions from 55 on are read behind a prompt of 60.
    in_window = whole - (len(PROMPT) - WINDOW + 1) // BLOCK_SIZE
    by_group = [
        whole if group.spec.reads_everything else in_window for group in runners["decode"].groups
    ]
    decode = cluster.network.workers["decode"]
    assert decode.counters["pulled_blocks"] == sum(by_group)
    assert decode.counters["pulled_bytes"] == sum(
        count * runners["decode"].kv_cache.pool_of(group).block_bytes
        for group, count in enumerate(by_group)
    )


def test_a_block_that_goes_bad_is_found_before_it_leaves_the_window(
    make_runner: MakeRunner,
) -> None:
    """Afterwards nobody would look at it, and tokens were computed from it."""
    worker = OneWorker(make_runner(64, "windowed"))
    sequence = worker.start(PROMPT, ANSWER)
    for _ in range(2):
        worker.engine.run_once(may_wait=False)
    [table] = sequence.block_tables
    assert 0 < sequence.num_computed_tokens < len(PROMPT)
    worker.runner.kv_cache.tensors[0][table[table.first_live]].neg_().sub_(1)
    worker.run_until_idle(sequence)
    assert worker.token_ids == [] and len(worker.failures) == 1
    assert worker.counters["digest_mismatches"] == 1
    # What was computed from it is not found either.
    worker.start((*PROMPT, 9), ANSWER)
    worker.engine.run_once(may_wait=False)
    assert worker.counters["cached_prompt_tokens"] <= (table.first_live) * BLOCK_SIZE


def test_a_block_found_bad_fails_those_that_have_left_it_behind(make_runner: MakeRunner) -> None:
    """Their window has passed it, but their later keys were computed from it."""
    worker = OneWorker(make_runner(64, "windowed"))
    sequence = worker.start(PROMPT, ANSWER)
    for _ in range(3):
        worker.engine.run_once(may_wait=False)
    [table] = sequence.block_tables
    [(block_id, generation), *_] = table.left
    assert worker.pools.of(0).block(block_id).generation == generation
    worker.runner.kv_cache.tensors[0][block_id].neg_().sub_(1)
    # A reader of the same prefix, which distrusts what is cached.
    other = Sequence(AttemptKey("other", 0, 2), (*PROMPT[:9], 7), ANSWER, distrust=True)
    worker.inbox.put(msg.StartDecode(other, Recipient(worker.gateway_stream, 2), None))
    for _ in range(3):
        worker.engine.run_once(may_wait=False)
    assert len(worker.failures) == 1 and not sequence.is_admitted
