"""Answers with guesses are the answers without: whoever guesses, whatever happens meanwhile.

In the class `exact`, with real engines. Every guess is checked (as DraftLengths would not), and the
simulated gateway compares each token with that of an undisturbed run without guesses.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from baton.services.worker import messages as msg
from baton.services.worker.sequence_table import Recipient
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.host_executor import HostExecutor
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.kv.capacity import num_blocks_for
from baton.shared.kv.sequence import AttemptKey, FinishReason, Sequence
from baton.shared.model_files.fields import ModelError
from baton.shared.sampling import SamplingParams
from baton.shared.token_masks import TokenMasks, num_mask_words
from tests.unit.worker.conftest import BLOCK_SIZE, MakeRunner
from tests.unit.worker.drafting import DraftingRunner, Planned
from tests.unit.worker.late_runner import LateRunner
from tests.unit.worker.network import Clock
from tests.unit.worker.sim_worker import SimWorker
from tests.unit.worker.simulation import Cluster, Request

COPYING = (5, 9, 13, 7, 40, 5, 9, 13, 7, 40, 5, 9)
PLAIN = tuple(3 + 7 * i % 50 for i in range(21))
LENGTH = 24
WAYS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.7, seed=3),
    "top-k": SamplingParams(temperature=1.0, top_k=3, seed=4),
    "top-p": SamplingParams(temperature=1.0, top_p=0.5, seed=5),
    "min-p": SamplingParams(temperature=0.9, min_p=0.2, seed=6),
    # What was emitted counts, and a guess as if it had been.
    "penalties": SamplingParams(
        temperature=0.7,
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        repetition_penalty=1.25,
        seed=7,
    ),
    "bans": SamplingParams(
        temperature=0.5,
        frequency_penalty=1.5,
        logit_bias=((5, 2.0), (9, -100.0)),
        allowed_token_ids=frozenset(range(1, 55)),
        stop_token_ids=frozenset(range(50, 61)),
        min_tokens=LENGTH,
        seed=8,
    ),
}
PARAMS = [
    dataclasses.replace(params, max_tokens=LENGTH, ignore_eos=True) for params in WAYS.values()
]


class Answers:
    """Those of undisturbed runs without guesses."""

    def __init__(self, runner: ModelRunner) -> None:
        self._loop = PlainLoop(runner)
        self._known: dict[tuple[tuple[int, ...], SamplingParams], list[int]] = {}

    def to(self, prompt: tuple[int, ...], params: SamplingParams) -> list[int]:
        if (prompt, params) not in self._known:
            [self._known[prompt, params]] = self._loop.generate([prompt], [params])
        return self._known[prompt, params]


@pytest.fixture(scope="module")
def answers(make_runner: MakeRunner) -> Answers:
    return Answers(make_runner(64))


@pytest.fixture(scope="module")
def answers_by(make_runner: MakeRunner, answers: Answers) -> dict[str, Answers]:
    """Kind of layers → its answers."""
    return {
        "full": answers,
        **{kind: Answers(make_runner(64, kind)) for kind in ("states", "states alone")},
    }


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("engine_loop", "handoff"):
        monkeypatch.setattr(f"baton.services.worker.{module}.time", clock)
    return clock


def nearly(answer: list[int]) -> tuple[int, ...]:
    """A prediction with a wrong token, a word too many, and one left out."""
    predicted = list(answer)
    predicted[5] = (predicted[5] + 1) % 61
    return (*predicted[:11], 60, *predicted[11:16], *predicted[17:])


def drafting_cluster(runners: dict[str, Any], clock: Clock) -> Cluster:
    """Its prefill worker guesses nothing."""
    decode = DraftingRunner(runners["decode"], num_drafts=5)
    return Cluster({"prefill": runners["prefill"], "decode": decode}, clock)  # type: ignore[dict-item]


def submit_all(cluster: Cluster, answers: Answers, *, predicts: bool) -> list[Request]:
    """Of each kind one that is handed over, and one that the worker computes by itself."""
    requests = []
    for number, params in enumerate(PARAMS):
        prompt = PLAIN if number % 2 else COPYING
        expected = answers.to(prompt, params)
        prediction = nearly(expected) if predicts else ()
        for is_local in (False, True):
            requests.append(
                cluster.submit(prompt, params, expected, is_local=is_local, prediction=prediction)
            )
    return requests


def counted(cluster: Cluster) -> dict[str, int]:
    return dict(cluster.network.workers["decode"].counters)


@pytest.mark.parametrize(
    ("kind", "predicts", "runs_ahead"),
    [
        ("full", False, False),
        ("full", False, True),
        ("full", True, False),
        ("full", True, True),
        ("states", True, False),
        ("states alone", True, True),
    ],
)
def test_mixed_batches_in_every_way_of_drawing(
    make_runner: MakeRunner,
    answers_by: dict[str, Answers],
    clock: Clock,
    kind: str,
    predicts: bool,
    runs_ahead: bool,
) -> None:
    """Chunked prompts, prefix hits, answers that are handed over and that are not, together."""
    answers = answers_by[kind]
    how = {} if kind == "full" else {"state_checkpoints": 4}
    names = ("prefill", "decode")
    runners: dict[str, Any] = {name: make_runner(120, kind, **how) for name in names}
    if runs_ahead:
        runners = {name: LateRunner(runner) for name, runner in runners.items()}
    cluster = drafting_cluster(runners, clock)
    requests = submit_all(cluster, answers, predicts=predicts)
    cluster.settle()
    assert [request.token_ids for request in requests] == [each.expected for each in requests]
    counters = counted(cluster)
    assert counters["accepted_tokens"] > (60 if predicts else 0)
    assert counters["drafted_tokens"] > counters["accepted_tokens"]
    worker = cluster.network.workers["decode"]
    by_position = worker.engine._stepper.accepted_by_position
    assert sum(by_position) == counters["accepted_tokens"]
    assert sorted(by_position, reverse=True) == by_position


@pytest.mark.parametrize("kind", ["full", "states"])
def test_with_too_few_blocks(
    make_runner: MakeRunner, answers_by: dict[str, Answers], clock: Clock, kind: str
) -> None:
    """Answers give way to each other, and go on in other attempts; guesses never make one give
    way."""
    answers, names = answers_by[kind], ("prefill", "decode")
    cluster = drafting_cluster({name: make_runner(16, kind) for name in names}, clock)
    requests = submit_all(cluster, answers, predicts=True)
    cluster.settle()
    assert [request.token_ids for request in requests] == [each.expected for each in requests]
    assert counted(cluster)["preemptions"] > 0 and counted(cluster)["accepted_tokens"] > 0


@pytest.mark.parametrize(
    ("is_local", "num_rounds", "kind"),
    [
        *[(False, rounds, kind) for rounds in (4, 5, 6, 7) for kind in ("full", "states")],
        (True, 6, "full"),
        (True, 6, "states"),
    ],
)
def test_a_decode_worker_that_dies_after_so_many_rounds(
    make_runner: MakeRunner,
    answers_by: dict[str, Answers],
    clock: Clock,
    is_local: bool,
    num_rounds: int,
    kind: str,
) -> None:
    """However long the accepted chain was: the answer goes on where it was, on a worker that
    guesses or on one that does not."""
    answers, names = answers_by[kind], ("prefill", "decode")
    cluster = drafting_cluster({name: make_runner(64, kind) for name in names}, clock)
    network, params = cluster.network, PARAMS[num_rounds % len(PARAMS)]
    expected = answers.to(COPYING, params)
    request = cluster.submit(
        COPYING, params, expected, is_local=is_local, prediction=nearly(expected)
    )
    for _ in range(num_rounds):
        network.go_round()
    if num_rounds % 2:
        network._runners["decode"] = make_runner(64, kind)
    network.kill("decode")
    cluster.settle()
    assert request.token_ids == expected and request.num_attempts == 2


@pytest.mark.parametrize("is_settled", [False, True])
@pytest.mark.parametrize("kind", ["states", "states alone"])
def test_a_step_of_guesses_that_fails(
    make_runner: MakeRunner,
    answers_by: dict[str, Answers],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    is_settled: bool,
) -> None:
    """Before states go on to the last guess that stands, or behind that: from neither is an answer
    gone on with."""
    settle, num_guessing = HostExecutor._settle, 0

    def fail_once(executor: HostExecutor, plans: Any, rows: Any, drawn: Any) -> None:
        nonlocal num_guessing
        num_guessing += sum(bool(row.draft_ids) for row in rows) > 1
        fails = num_guessing == 2
        if is_settled or not fails:
            settle(executor, plans, rows, drawn)
        if fails:
            num_guessing += 1
            raise RuntimeError("a fault of the test")

    monkeypatch.setattr(HostExecutor, "_settle", fail_once)
    runners: dict[str, Any] = {
        name: make_runner(64, kind, state_checkpoints=4) for name in ("prefill", "decode")
    }
    cluster = drafting_cluster(runners, clock)
    requests = []
    for prompt, params in ((COPYING, PARAMS[0]), (PLAIN, PARAMS[1]), (PLAIN, PARAMS[5])):
        expected = answers_by[kind].to(prompt, params)
        how = {"is_local": True, "prediction": nearly(expected)}
        requests.append(cluster.submit(prompt, params, expected, **how))  # type: ignore[arg-type]
    cluster.settle()
    assert [request.token_ids for request in requests] == [each.expected for each in requests]
    assert [request.num_attempts for request in requests] == [2, 2, 2]
    assert counted(cluster)["accepted_tokens"] > 0


class OneWorker(SimWorker):
    """Checks after every iteration that nobody holds blocks for guesses that fell."""

    def __init__(self, runner: Any) -> None:
        super().__init__("w", "ab" * 16, runner, lambda _, mail: self._hear(mail))
        self.token_ids: list[int] = []
        self.reasons: list[int] = []
        self.checked: list[tuple[int, int]] = []
        self.most_held = [0] * len(runner.groups)

    def answer(self, sequence: Sequence) -> list[int]:
        recipient = Recipient(self.gateway_stream, 1)
        self.inbox.put(msg.StartDecode(sequence, recipient, None))
        for _ in range(150):
            self.engine.run_once(may_wait=False)
            self.check()
            tables = sequence.block_tables if sequence.output_token_ids else ()
            grow = [group.spec.grows for group in self.pools.groups]
            for table in itertools.compress(tables, grow):
                assert len(table) == num_blocks_for(sequence.num_scheduled_tokens, BLOCK_SIZE)
                assert table.num_sealed <= sequence.num_computed_tokens // BLOCK_SIZE
            held = [len(table) - table.count(NO_BLOCK) for table in sequence.block_tables]
            self.most_held = list(map(max, self.most_held, held or self.most_held))
        assert self.leftovers == {}
        return self.token_ids

    def _hear(self, mail: list[msg.Outgoing]) -> None:
        for message in mail:
            if isinstance(message, msg.ToGateway):
                step = message.message.step
                self.token_ids += step.token_ids
                self.reasons += [reason for reason in step.finish_reasons if reason]
                self.checked += [(p.num_accepted, p.num_rejected) for p in step.predictions]


@pytest.mark.parametrize(
    ("kind", "runs_ahead"),
    [
        ("full", True),
        ("windowed", False),
        ("one pool", False),
        ("two pools", True),
        ("states", False),
        ("states alone", True),
    ],
)
def test_only_what_stands_is_sealed_and_keeps_blocks(
    make_runner: MakeRunner, kind: str, runs_ahead: bool
) -> None:
    """Over several windows, with guesses that fill several blocks and mostly fall."""
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    [expected] = PlainLoop(make_runner(64, kind)).generate([PLAIN], [params])

    def guess(sequence: Sequence, most: int) -> list[int]:
        index = sequence.next_index
        coming = enumerate(expected[index : index + most], index)
        return [token if at % 4 else (token + 1) % 61 for at, token in coming]

    how = {"state_checkpoints": 4, "max_num_seqs": 4} if "states" in kind else {}
    runner: Any = make_runner(48, kind, num_drafts=15, **how)
    plain = make_runner(48, kind, **how)
    assert plain.kv_cache.layout() == runner.kv_cache.layout()
    worker = OneWorker(
        DraftingRunner(LateRunner(runner) if runs_ahead else runner, Planned(guess), 15)
    )
    sequence = Sequence(AttemptKey("r", 0, 1), PLAIN, params)
    assert worker.answer(sequence) == expected
    assert worker.counters["accepted_tokens"] > (0 if runs_ahead else 10)
    for share, most in zip(runner.capacity.groups, worker.most_held, strict=True):
        assert share.max_blocks is None or most <= share.max_blocks
    # What it sealed is found, and is what a worker without guesses would have computed.
    follow_up = (*PLAIN, *expected)
    fresh = PlainLoop(make_runner(64, kind))
    [further] = fresh.generate([follow_up], [dataclasses.replace(params, max_tokens=4)])
    worker.token_ids.clear()
    second = Sequence(AttemptKey("s", 0, 1), follow_up, dataclasses.replace(params, max_tokens=4))
    assert worker.answer(second) == further
    assert worker.counters["cached_prompt_tokens"] >= len(PLAIN) + 40


@pytest.mark.parametrize("kind", ["full", "states"])
def test_a_stop_token_within_the_guesses(
    make_runner: MakeRunner, answers_by: dict[str, Answers], kind: str
) -> None:
    """What was computed behind it is in nothing that the next turn finds."""
    answers = answers_by[kind]
    expected = answers.to(COPYING, PARAMS[0])
    stop = next(token for index, token in enumerate(expected) if index > 6)
    end = expected.index(stop) + 1
    params = dataclasses.replace(PARAMS[0], stop_token_ids=frozenset([stop]))
    how = {} if kind == "full" else {"state_checkpoints": 4, "max_num_seqs": 4}
    worker = OneWorker(DraftingRunner(make_runner(24, kind, **how), num_drafts=15))
    sequence = Sequence(
        AttemptKey("r", 0, 1), COPYING, params, prediction_token_ids=tuple(expected)
    )
    assert worker.answer(sequence) == expected[:end]
    assert sequence.finish_reason is FinishReason.STOP and len(worker.reasons) == 1
    # What was guessed beyond the end stands in no count of the answer's tokens.
    assert worker.counters["generated_tokens"] == end
    follow_up, few = (*COPYING, *expected[:end], 5), dataclasses.replace(PARAMS[0], max_tokens=4)
    worker.token_ids.clear()
    second = Sequence(AttemptKey("s", 0, 1), follow_up, few)
    assert worker.answer(second) == answers.to(follow_up, few)
    assert worker.counters["cached_prompt_tokens"] >= len(COPYING)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 9])
def test_an_end_within_the_guesses(
    make_runner: MakeRunner, answers: Answers, max_tokens: int
) -> None:
    """No more is guessed than the answer may have, whose last token is never computed."""
    expected = answers.to(COPYING, PARAMS[0])
    params = dataclasses.replace(PARAMS[0], max_tokens=max_tokens)
    worker = OneWorker(DraftingRunner(make_runner(24), num_drafts=15))
    prediction = (*expected, 1, 2, 3)
    sequence = Sequence(AttemptKey("r", 0, 1), COPYING, params, prediction_token_ids=prediction)
    assert worker.answer(sequence) == expected[:max_tokens]
    assert sequence.finish_reason is FinishReason.LENGTH
    assert worker.checked == ([(max_tokens - 2, 0)] if max_tokens > 2 else [])


def test_who_does_not_want_it_gets_none(make_runner: MakeRunner, answers: Answers) -> None:
    params = dataclasses.replace(PARAMS[0], speculate=False)
    worker = OneWorker(DraftingRunner(make_runner(24)))
    prediction = tuple(answers.to(COPYING, PARAMS[0]))
    sequence = Sequence(AttemptKey("r", 0, 1), COPYING, params, prediction_token_ids=prediction)
    assert worker.answer(sequence) == list(prediction)
    assert worker.counters["drafts"] == 0 and worker.checked == []


@pytest.mark.parametrize("token_budget", [None, 4])
def test_what_is_guessed_is_no_part_of_what_workers_must_have_in_common(
    make_runner: MakeRunner, token_budget: int | None
) -> None:
    layouts = {
        make_runner(48, "two pools", num_drafts=k, token_budget=token_budget).kv_cache.layout()
        for k in (0, 1, 15)
    }
    assert len(layouts) == 1


def test_more_drafts_than_a_step_checks_are_refused(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match="num_drafts: must be from 0 to 15, not 16"):
        EngineConfig(tmp_path, num_drafts=16)


class MustBegin:
    """Stands in for the matcher of a constraint that an answer begins with these tokens."""

    num_taken = 0

    def __init__(self, beginning: list[int]) -> None:
        self._beginning = beginning

    def take(self, token_ids: tuple[int, ...]) -> None:
        self.num_taken += len(token_ids)

    def forced(self, most: int) -> tuple[int, ...]:
        return tuple(self._beginning[self.num_taken :][:most])

    def masks(self, draft_ids: tuple[int, ...] = ()) -> TokenMasks:
        return np.full((1 + len(draft_ids), num_mask_words(61)), 0xFFFFFFFF, np.uint32)


@pytest.mark.parametrize("num_checkpoints", [0, 4])
def test_states_go_through_tokens_that_must_follow(
    make_runner: MakeRunner, answers_by: dict[str, Answers], num_checkpoints: int
) -> None:
    """On a CPU these are checked together though nobody guesses."""
    params = PARAMS[0]
    expected = answers_by["states"].to(PLAIN, params)
    how = {"state_checkpoints": num_checkpoints, "max_num_seqs": 4}
    runner = make_runner(24, "states", **how)
    worker = OneWorker(runner)
    worker.engine._stepper._constraining.most_forced = runner.most_forced
    matcher: Any = MustBegin(expected[:17])
    sequence = Sequence(AttemptKey("r", 0, 1), PLAIN, params, matcher=matcher)
    assert worker.answer(sequence) == expected
    assert worker.counters["steps"] < LENGTH
