"""The engine loop with a step launched before the result of the one before is known."""

from __future__ import annotations

import queue
from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from baton.services.worker import messages as msg
from baton.services.worker.engine_loop import EngineLoop
from baton.services.worker.failpoints import Failpoints
from baton.services.worker.sealing import Sealer
from baton.services.worker.sequence_table import Recipient
from baton.services.worker.stepper import BatchLimits
from baton.shared.engine.batch import Batch
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.kv.drawn import Drawn, TokenLogprobs
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import AttemptKey, FinishReason, Sequence
from baton.shared.rpc.convert import FINISH_REASON_FROM_PB
from baton.shared.rpc.errors import BatonError, EngineFailure, InvalidField, from_failure
from baton.shared.sampling import SamplingParams
from baton.shared.telemetry import Counters, Trace
from baton.shared.token_masks import TokenMasks
from baton.v1 import decode_service_pb2, worker_service_pb2
from tests.unit.worker.conftest import BLOCK_SIZE, MakeRunner
from tests.unit.worker.late_runner import LateBegun, LateRunner, LateStep

NUM_BLOCKS = 24
PROMPTS = [(5, 9, 13, 7, 40), (11, 3, 8), (21, 30, 4, 4, 17, 9, 33)]
BAD_SEED = 666


@dataclass
class LoggedStep:
    step: LateStep
    log: list[str]

    def result(self) -> list[Seq[Drawn]]:
        self.log.append("result")
        handles = [row.handle for row in self.step.batch.rows]
        before = [handle.drawn_token if handle is not None else 0 for handle in handles]
        result = self.step.result()
        for handle, drawn, last in zip(handles, result, before, strict=True):
            # As on a device: the step behind reads the last token that was one.
            if handle is not None and drawn and drawn[-1].failure is not None:
                handle.drawn_token = last
        return result

    def prompt_logprobs(self, row: int) -> Seq[TokenLogprobs | None]:
        return self.step.prompt_logprobs(row)


@dataclass
class LoggedBegun:
    begun: LateBegun
    log: list[str]
    fails: bool

    def draw(self, masks: Mapping[int, TokenMasks]) -> LoggedStep:
        step = self.begun.draw(masks)
        if self.fails:
            self.log.append("refused to draw")
            raise RuntimeError("planted")
        self.log.append("draw")
        return LoggedStep(step, self.log)


class FlakyRunner(LateRunner):
    """Notes what is asked of it; steps with a row of `BAD_SEED` at `bad_from` or later fail."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner)
        self.log: list[str] = []
        self.ends: defaultdict[int, list[int]] = defaultdict(list)
        """By seed, the context lengths of the rows that were launched."""
        self.bad_from = 1 << 30
        self.fails_to_begin = self.fails_to_draw = False
        self._num_alone = 0
        """Rows of a step that was refused, which are yet to come one by one."""

    def launch(self, batch: Batch) -> LoggedStep:  # type: ignore[override]
        if self._num_alone:
            self._num_alone -= 1
            return self._launch_alone(batch)
        self._note(batch)
        self.log.append("launch")
        return LoggedStep(super().launch(batch), self.log)

    def begin(self, batch: Batch) -> LoggedBegun:  # type: ignore[override]
        self._note(batch)
        self.log.append("begin")
        begun = LoggedBegun(super().begin(batch), self.log, self.fails_to_draw)
        self._num_alone = len(batch.rows) if begun.fails else 0
        return begun

    def _note(self, batch: Batch) -> None:
        self._num_alone = len(batch.rows)
        if self.fails_to_begin:
            raise RuntimeError("planted")
        self._refuse_bad("refused", batch)
        self._num_alone = 0
        for row in batch.rows:
            if row.sampling is not None:
                self.ends[row.sampling.seed].append(row.context_len)

    def _launch_alone(self, batch: Batch) -> LoggedStep:
        self.log.append("alone")
        assert len(batch.rows) == 1
        self._refuse_bad("refused alone", batch)
        return LoggedStep(super().launch(batch), [])

    def _refuse_bad(self, what: str, batch: Batch) -> None:
        for row in batch.rows:
            is_bad = row.sampling is not None and row.sampling.seed == BAD_SEED
            if is_bad and row.position >= self.bad_from:
                self.log.append(what)
                raise RuntimeError("planted")


class Bench:
    """One engine loop, and what its gateway heard."""

    make_flaky: ClassVar[type[FlakyRunner]] = FlakyRunner

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = self.make_flaky(runner)
        self.pools = Pools(runner.groups, runner.capacity)
        self.tokens: defaultdict[int, list[int]] = defaultdict(list)
        self.reasons: dict[int, FinishReason] = {}
        self.failures: dict[int, BatonError] = {}
        failpoints = Failpoints(set())
        sums = runner.block_sums()
        self.engine = EngineLoop(
            self.runner,  # type: ignore[arg-type]
            self.pools,
            Sealer(self.pools, runner.kv_cache, sums, "ab" * 16, "c" * 64, failpoints),
            identity=msg.Peer("w", "ab" * 16, ""),
            limits=BatchLimits(token_budget=16, max_num_seqs=4),
            inbox=queue.SimpleQueue(),
            submit_pull=lambda job: None,
            deliver=self._hear,
            failpoints=failpoints,
            counters=Counters(),
            trace=Trace(None, ""),
        )

    def start(
        self, number: int, prompt: tuple[int, ...], params: SamplingParams, **more: Any
    ) -> Sequence:
        sequence = Sequence(AttemptKey(f"r{number}", 0, 1), prompt, params, **more)
        self.engine.inbox.put(msg.StartDecode(sequence, Recipient("g", number), None))
        return sequence

    def step(self) -> None:
        self.engine.run_once(may_wait=False)
        self.check()

    def run(self) -> None:
        """Until all is over."""
        self.step()
        while self.engine.num_sequences or self.engine._in_flight:
            self.step()
        assert self.num_held == 0

    def check(self) -> None:
        states: list[worker_service_pb2.GetWorkerStateResponse] = []
        self.engine._handle(msg.Inspect(True, states.append))
        assert [state.integrity_error for state in states] == [""]

    @property
    def num_held(self) -> int:
        return sum(self.pools.capacity.num_blocks) - sum(self.pools.num_free)

    def _hear(self, mail: list[msg.Outgoing]) -> None:
        for message in mail:
            if not isinstance(message, msg.ToGateway):
                continue
            response = message.message
            if response.HasField("failed"):
                self.failures[response.failed.slot] = from_failure(response.failed.failure)
            step = response.step
            columns = zip(
                step.slots, step.indices, step.token_ids, step.finish_reasons, strict=True
            )
            for number, index, token_id, reason_pb in columns:
                assert index == len(self.tokens[number]) and number not in self.reasons
                self.tokens[number].append(token_id)
                reason = FINISH_REASON_FROM_PB[reason_pb]
                if reason is not None:
                    self.reasons[number] = reason


@pytest.fixture
def bench(make_runner: MakeRunner) -> Bench:
    return Bench(make_runner(NUM_BLOCKS))


def sampling(seed: int, max_tokens: int, stop: frozenset[int] = frozenset()) -> SamplingParams:
    """Drawn, so that tokens differ from step to step."""
    return SamplingParams(
        temperature=1.0, seed=seed, max_tokens=max_tokens, stop_token_ids=stop, ignore_eos=True
    )


def undisturbed(
    make_runner: MakeRunner, prompt: tuple[int, ...], params: SamplingParams
) -> list[int]:
    [tokens] = PlainLoop(make_runner(NUM_BLOCKS)).generate([prompt], [params])
    return tokens


# What others wait for


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [(8, ["launch", "heard", "result"]), (1, ["heard", "result"])],
    ids=["behind the launch", "nothing to launch"],
)
def test_news_leave_before_a_result_is_waited_for(
    bench: Bench, max_tokens: int, expected: list[str]
) -> None:
    bench.start(0, PROMPTS[1], sampling(1, max_tokens))
    bench.step()
    log = bench.runner.log
    assert log == ["launch"]
    log.clear()
    bench.engine._reports._deliver = lambda mail: log.append("heard")
    # Refused: no pool holds it.
    bench.start(1, PROMPTS[0], sampling(2, BLOCK_SIZE * NUM_BLOCKS))
    bench.step()
    assert log[: len(expected)] == expected


def test_a_first_token_leaves_before_its_prompt_is_sealed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter is let go of between the two; behind other tokens it is not."""
    log: list[str] = []
    seal = bench.engine._sealer.seal_computed

    def sealing(*args: Any, **options: Any) -> None:
        log.append("seal")
        seal(*args, **options)

    monkeypatch.setattr(bench.engine._sealer, "seal_computed", sealing)
    monkeypatch.setattr(bench.engine, "_let_go", lambda: log.append(f"{len(bench.tokens[0])} out"))
    bench.start(0, tuple(range(3, 23)), sampling(1, 2 * BLOCK_SIZE))
    bench.engine.run_once()
    while bench.engine.num_sequences:
        bench.engine.run_once()
    # Of two chunks.
    assert log[:3] == ["seal", "1 out", "seal"] and log[3:] == ["seal"] * (len(log) - 3)


def test_a_sequence_joins_in_the_message_of_its_first_token(bench: Bench) -> None:
    heard: list[decode_service_pb2.DecodeResponse] = []
    bench.engine._reports._deliver = lambda mail: heard.extend(
        each.message for each in mail if isinstance(each, msg.ToGateway)
    )
    for number in range(2):
        bench.start(number, PROMPTS[number], sampling(number, 2))
    bench.run()
    joined = [(number, each.slot) for number, all in enumerate(heard) for each in all.step.joined]
    firsts = [
        (number, slot)
        for number, each in enumerate(heard)
        for slot, index in zip(each.step.slots, each.step.indices, strict=True)
        if index == 0
    ]
    assert joined == firsts and len(joined) == 2
    assert all(each.step.token_ids for each in heard), "no message but those with tokens"


# Blocks under a step in flight


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_a_cancelled_sequence_keeps_its_blocks_until_the_step_in_flight_has_retired(
    bench: Bench, num_steps: int
) -> None:
    sequence = bench.start(0, PROMPTS[0], sampling(1, 40))
    for _ in range(num_steps):
        bench.step()
    num_held = bench.num_held
    assert num_held > 0 and sequence.num_steps_in_flight == 1
    bench.engine._handle(msg.CancelAttempts(sequence.key))
    assert bench.engine.num_sequences == 0
    assert bench.num_held == num_held, "the step in flight may still write to them"
    bench.check()
    num_heard = len(bench.tokens[0])
    bench.step()
    assert bench.num_held == 0
    assert len(bench.tokens[0]) == num_heard, "what it draws yet is nobody's"


def test_a_sequence_that_ends_with_a_row_in_flight_keeps_its_blocks_until_that_retired(
    bench: Bench, make_runner: MakeRunner
) -> None:
    free_running = undisturbed(make_runner, PROMPTS[0], sampling(1, 40))
    last = next(i for i in range(4, 40) if free_running[i] not in free_running[:i])
    stop = frozenset({free_running[last]})
    bench.start(0, PROMPTS[0], sampling(1, 40, stop))
    num_held = 0
    while bench.engine.num_sequences or not num_held:
        bench.step()
        num_held = max(num_held, bench.num_held)
    assert bench.reasons[0] is FinishReason.STOP
    assert bench.tokens[0] == free_running[: last + 1]
    assert bench.num_held == num_held, "the step in flight may still write to them"
    bench.step()
    assert bench.num_held == 0
    assert bench.tokens[0] == free_running[: last + 1], "what was drawn behind it is nobody's"


# Nothing is launched behind the last token


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 9])
def test_no_row_is_launched_behind_the_last_token(
    bench: Bench, make_runner: MakeRunner, max_tokens: int
) -> None:
    asked = [sampling(1, max_tokens), sampling(2, max_tokens + 2)]
    for number, params in enumerate(asked):
        bench.start(number, PROMPTS[number], params)
    bench.run()
    for number, params in enumerate(asked):
        prompt = PROMPTS[number]
        assert bench.reasons[number] is FinishReason.LENGTH
        assert bench.tokens[number] == undisturbed(make_runner, prompt, params)
        ends = bench.runner.ends[params.seed]
        assert ends == list(range(len(prompt), len(prompt) + params.max_tokens))


def test_an_answer_that_fills_all_blocks_ends(bench: Bench, make_runner: MakeRunner) -> None:
    """Its last token is stored nowhere."""
    prompt = PROMPTS[0]
    params = sampling(1, BLOCK_SIZE * NUM_BLOCKS - len(prompt) + 1)
    bench.start(0, prompt, params)
    bench.start(1, prompt, sampling(1, params.max_tokens + 1))
    bench.run()
    [expected] = PlainLoop(make_runner(NUM_BLOCKS + 1)).generate([prompt], [params])
    assert (bench.tokens[0], bench.reasons[0]) == (expected, FinishReason.LENGTH)
    assert isinstance(bench.failures[1], InvalidField)


# A step that cannot be launched


@pytest.mark.parametrize("num_drawn", [0, 1, 4])
def test_a_bad_row_fails_alone_after_the_step_in_flight_was_collected(
    bench: Bench, make_runner: MakeRunner, num_drawn: int
) -> None:
    asked = [sampling(1, 12), sampling(BAD_SEED, 12), sampling(3, 12)]
    expected = [undisturbed(make_runner, *each) for each in zip(PROMPTS, asked, strict=True)]
    bench.runner.bad_from = len(PROMPTS[1]) + num_drawn - 1 if num_drawn else 0
    for number, params in enumerate(asked):
        bench.start(number, PROMPTS[number], params)
    bench.run()
    assert isinstance(bench.failures.pop(1), EngineFailure) and not bench.failures
    assert bench.tokens[1] == expected[1][:num_drawn]
    for number in (0, 2):
        assert bench.tokens[number] == expected[number]
        assert bench.reasons[number] is FinishReason.LENGTH
    log = bench.runner.log
    refused = log.index("refused")
    # Every step launched before was collected before the first row was tried alone.
    before = log[: log.index("alone", refused)]
    assert before.count("result") == before.count("launch")
    assert log.count("refused") == log.count("refused alone") == 1
    assert log.count("alone") == 3


# Logits that are not numbers


@pytest.mark.parametrize("num_steps", [2, 5])
def test_logits_that_are_not_numbers_fail_the_request(
    bench: Bench, make_runner: MakeRunner, num_steps: int
) -> None:
    params = [sampling(1, 12), sampling(2, 12)]
    expected = undisturbed(make_runner, PROMPTS[0], params[0])
    bench.start(0, PROMPTS[0], params[0])
    spoiled = bench.start(1, PROMPTS[1], params[1])
    for _ in range(num_steps):
        bench.step()
    bench.runner.kv_cache.tensors[0][spoiled.block_tables[0]] = float("nan")
    bench.run()
    error = bench.failures.pop(1)
    assert isinstance(error, EngineFailure) and "not numbers" in error.message
    assert not bench.failures and 1 not in bench.reasons
    assert len(bench.tokens[1]) == num_steps - 1
    assert bench.tokens[0] == expected


def test_blocks_of_a_failed_sequence_are_not_found_again(
    bench: Bench, make_runner: MakeRunner
) -> None:
    prompt = tuple(range(3, 3 + 2 * BLOCK_SIZE + 1))
    spoiled = bench.start(0, prompt, sampling(1, 4))
    # One chunk is a block at least: after some steps the first block is in the cache.
    while not spoiled.num_sealed_blocks:
        bench.step()
    assert bench.pools.prefix_cache.num_cached
    bench.runner.kv_cache.tensors[0][spoiled.block_tables[0]] = float("nan")
    bench.run()
    assert isinstance(bench.failures.pop(0), EngineFailure)
    assert bench.pools.prefix_cache.num_cached == 0
    bench.start(1, prompt, sampling(1, 4))
    bench.run()
    assert bench.tokens[1] == undisturbed(make_runner, prompt, sampling(1, 4))
