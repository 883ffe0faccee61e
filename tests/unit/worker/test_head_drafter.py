"""A head guesses by the model's hidden states: answers are the answers without, and what it is told
is what it sees.

In the class `exact`, with real engines, for a model that can be guessed and a head that is right at
times (tests/heads.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.services.decode import chains
from baton.services.worker import messages as msg
from baton.services.worker.drafting import Drafting
from baton.services.worker.sequence_table import Recipient
from baton.services.worker.stepper import BatchLimits
from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.model_files.fields import ModelError
from baton.shared.sampling import SamplingParams
from tests.heads import fit_head, make_head, make_target
from tests.unit.worker.conftest import BLOCK_SIZE, CONFIG
from tests.unit.worker.drafting import AllOfThem, GuessingRunner
from tests.unit.worker.late_runner import LateRunner
from tests.unit.worker.network import Clock
from tests.unit.worker.sim_worker import SimWorker
from tests.unit.worker.simulation import Cluster
from tests.unit.worker.test_speculation import COPYING, PARAMS, PLAIN, Answers, OneWorker

WIDE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "num_key_value_heads": 4,
    "target_hidden_size": 32,
}
"""Of a head: with fewer numbers it would be right too seldom."""
GREEDY = PARAMS[0]
MakeRunner = Callable[..., ModelRunner]


@pytest.fixture(scope="module")
def make_runner(tmp_path_factory: pytest.TempPathFactory) -> MakeRunner:
    torch.set_num_threads(1)
    target = make_target(tmp_path_factory.mktemp("target"), CONFIG)

    def make(num_blocks: int, **how: Any) -> ModelRunner:
        if "draft_model_dir" in how:
            how = {"num_drafts": 4, "draft_kind": "eagle3", **how}
        config = EngineConfig(
            target, device="cpu", block_size=BLOCK_SIZE, num_blocks=num_blocks, **how
        )
        runner = ModelRunner(config)
        assert runner.determinism == "exact"
        return runner

    return make


@pytest.fixture(scope="module")
def head_dir(make_runner: MakeRunner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a vocabulary that is a part of the model's."""
    head_dir = make_head(tmp_path_factory.mktemp("head"), CONFIG, draft_vocab_size=50, **WIDE)
    fit_head(head_dir, make_runner(32, draft_model_dir=head_dir))
    return head_dir


@pytest.fixture(scope="module")
def answers(make_runner: MakeRunner) -> Answers:
    return Answers(make_runner(64))


@pytest.fixture
def make_guessing(make_runner: MakeRunner, head_dir: Path) -> Callable[..., Any]:
    def make(num_blocks: int, **how: Any) -> Any:
        return GuessingRunner(make_runner(num_blocks, draft_model_dir=head_dir, **how))

    return make


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("engine_loop", "handoff"):
        monkeypatch.setattr(f"baton.services.worker.{module}.time", clock)
    return clock


def answer(worker: OneWorker, params: SamplingParams = GREEDY) -> list[int]:
    return worker.answer(Sequence(AttemptKey("r", 0, 1), PLAIN, params))


@pytest.mark.parametrize(("num_blocks", "runs_ahead"), [(120, False), (16, True)], ids=str)
def test_mixed_batches_in_every_way_of_drawing(
    make_runner: MakeRunner,
    make_guessing: Callable[..., Any],
    answers: Answers,
    clock: Clock,
    num_blocks: int,
    runs_ahead: bool,
) -> None:
    """Prompts that are handed over, of which it sees nothing, and chunked ones that it sees;
    prefixes that were found; answers that give way and come again."""
    decode = make_guessing(num_blocks)
    if runs_ahead:
        decode._runner = LateRunner(decode._runner)
    cluster = Cluster({"prefill": make_runner(num_blocks), "decode": decode}, clock)
    requests = [
        cluster.submit(prompt, params, answers.to(prompt, params), is_local=is_local)
        for number, params in enumerate(PARAMS)
        for prompt in ([PLAIN] if number % 2 else [COPYING])
        for is_local in (False, True)
    ]
    cluster.settle()
    assert [request.token_ids for request in requests] == [each.expected for each in requests]
    counters = cluster.network.workers["decode"].counters
    assert counters["drafted_tokens"] > counters["accepted_tokens"] > 20
    assert (counters["preemptions"] > 0) == (num_blocks == 16)
    decode.check()


@pytest.mark.parametrize("num_rounds", [5, 6])
def test_a_decode_worker_that_dies_after_so_many_rounds(
    make_runner: MakeRunner,
    make_guessing: Callable[..., Any],
    answers: Answers,
    clock: Clock,
    num_rounds: int,
) -> None:
    """Whether the next one guesses or not."""
    cluster = Cluster({"prefill": make_runner(64), "decode": make_guessing(64)}, clock)
    network, params = cluster.network, PARAMS[num_rounds % len(PARAMS)]
    expected = answers.to(COPYING, params)
    request = cluster.submit(COPYING, params, expected)
    for _ in range(num_rounds):
        network.go_round()
    network._runners["decode"] = make_runner(64) if num_rounds % 2 else make_guessing(64)
    network.kill("decode")
    cluster.settle()
    assert request.token_ids == expected and request.num_attempts == 2


@pytest.mark.parametrize("way", [0, 5], ids=["greedy", "penalties"])
def test_it_guesses_what_it_makes_of_the_whole_answer(
    make_runner: MakeRunner, make_guessing: Callable[..., Any], head_dir: Path, way: int
) -> None:
    """Token by token as if prompt and answer were computed at once, with the noise of the place."""
    params, runner = PARAMS[way], make_guessing(64)
    whole: Any = make_runner(64, draft_model_dir=head_dir)
    head = whole.draft
    table, first_guesses = [[*range(32)]], []
    guess = runner.drafter.drafts

    def checking(wanted: Any) -> Any:
        drafts = guess(wanted)
        [(sequence, _)], [draft] = wanted, drafts
        token_ids = sequence.token_slice(0, sequence.num_tokens)
        with torch.inference_mode():
            told = whole.launch(Batch([BatchRow(token_ids[:-1], 0, table)])).taps(0)
            [features] = head.fuse([[told]])
            handle = head.executor.open_row(params, 0, sequence)
            handle.move(1)
            row = BatchRow(token_ids[1:], 0, table, params, 0, handle, features=features)
            [[expected]] = head.launch([row]).result()
        assert draft.token_ids[0] == expected.token_id
        first_guesses.append(expected.token_id)
        return drafts

    runner.drafter.drafts = checking
    worker = OneWorker(runner)
    answer(worker, params)
    assert len(first_guesses) > 8 and worker.counters["accepted_tokens"] > 4


def test_tokens_that_it_missed_are_left_out(
    make_guessing: Callable[..., Any], answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As steps that tell nothing, or more than is kept until it computes them."""
    monkeypatch.setattr("baton.services.decode.head_drafter.MOST_PENDING", 2)
    monkeypatch.setattr("baton.services.decode.chains.FEW", 4)

    class Moody(AllOfThem):
        num_asked = 0

        def wanted(self, num_rows: int, sequences: Any) -> list[int]:
            self.num_asked += 1
            return super().wanted(num_rows, sequences) if self.num_asked % 7 < 3 else [0]

        def expects(self, num_rows: int) -> bool:
            return False

    params = dataclasses.replace(PARAMS[-1], max_tokens=60)
    runner = make_guessing(64)
    runner.drafting = Drafting(runner.drafter, Moody(4), 4)
    saw, num_told = runner.drafter.saw, 0

    def forgetful(*told: Any) -> None:
        nonlocal num_told
        num_told += 1
        if num_told % 3:
            saw(*told)

    runner.drafter.saw = forgetful
    worker = OneWorker(runner)
    assert answer(worker, params) == answers.to(PLAIN, params)
    assert worker.counters["drafts"] > 4
    runner.check()


def test_steps_that_were_launched_ahead_of_guesses_that_fell(
    make_guessing: Callable[..., Any], answers: Answers
) -> None:
    """They are further back than they were planned, and so is what they tell."""

    class SeldomWaits(AllOfThem):
        num_asked = 0

        def pays(self, num_rows: int, sequences: Any) -> bool:
            self.num_asked += 1
            return self.num_asked % 3 == 1

    params = dataclasses.replace(PARAMS[1], max_tokens=60)
    runner = make_guessing(64)
    runner._runner = LateRunner(runner._runner)
    runner.drafting = Drafting(runner.drafter, SeldomWaits(4), 4)
    saw = runner.drafter.saw
    places: list[tuple[int, int]] = []

    def noting(sequence: Sequence, position: int, states: Any) -> None:
        if position >= sequence.num_prompt_tokens:
            places.append((position, sequence.num_tokens - 1))
        saw(sequence, position, states)

    runner.drafter.saw = noting
    worker = OneWorker(runner)
    assert answer(worker, params) == answers.to(PLAIN, params)
    assert [told for told, _ in places] == [known for _, known in places]
    assert worker.counters["drafts"] > 8 and runner.drafting.num_given_up == 0
    runner.check()


def test_what_waits_for_a_head_takes_no_more_memory_than_was_reckoned(
    make_guessing: Callable[..., Any],
) -> None:
    """Where nobody wants guesses for a while: neither long chunks nor what steps told of others."""

    class WantsNone(AllOfThem):
        def wanted(self, num_rows: int, sequences: Any) -> list[int]:
            return [0] * len(sequences)

        def expects(self, num_rows: int) -> bool:
            return False

    runner = make_guessing(300, max_num_seqs=4)
    drafter, saw, most = runner.drafter, runner.drafter.saw, 0
    runner.drafting = Drafting(drafter, WantsNone(4), 4)

    def measuring(*told: Any) -> None:
        nonlocal most
        saw(*told)
        tensors = [
            seen.states
            for known in drafter._known.values()
            for seen in (*known.pending, known.last)
            if seen is not None
        ]
        memory = [tensor.untyped_storage() for tensor in tensors]
        most = max(most, sum({each.data_ptr(): each.nbytes() for each in memory}.values()))
        for known in drafter._known.values():
            assert known.num_pending == sum(len(seen.states) for seen in known.pending)

    drafter.saw = measuring
    limits = BatchLimits(token_budget=800, max_num_seqs=4)
    worker = SimWorker("w", "ab" * 16, runner, lambda _, mail: None, limits)
    params = dataclasses.replace(GREEDY, max_tokens=40)
    for number in range(4):
        prompt = tuple(3 + (number + 7 * i) % 50 for i in range(200))
        sequence = Sequence(AttemptKey(f"r{number}", 0, 1), prompt, params)
        worker.inbox.put(msg.StartDecode(sequence, Recipient(worker.gateway_stream, number), None))
    for _ in range(80):
        worker.engine.run_once(may_wait=False)
    assert worker.leftovers == {} and worker.counters["generated_tokens"] == 160
    assert runner.draft.pending_bytes / 2 < most <= runner.draft.pending_bytes
    runner.check()


def test_of_what_waits_only_what_is_computed_is_fused(
    make_guessing: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chains, "CHUNK", 8)
    monkeypatch.setattr(chains, "_CHUNK_BESIDE", 8)
    monkeypatch.setattr(chains, "FEW", 4)
    runner = make_guessing(64)
    fuse = runner.draft.fuse
    fused: list[int] = []

    def noting(states: Any) -> Any:
        fused.append(sum(len(each) for of_one in states for each in of_one))
        return fuse(states)

    runner.draft.fuse = noting
    worker = OneWorker(runner)
    answer(worker)
    assert worker.counters["drafts"] > 4 and max(fused) == 8


def test_who_does_not_want_it_gets_none(
    make_guessing: Callable[..., Any], answers: Answers
) -> None:
    params = dataclasses.replace(GREEDY, speculate=False)
    runner = make_guessing(64)
    worker = OneWorker(runner)
    assert answer(worker, params) == answers.to(PLAIN, params)
    assert worker.counters["drafts"] == 0 and not runner.drafter._known


def test_it_is_no_part_of_what_workers_must_have_in_common(
    make_runner: MakeRunner, head_dir: Path
) -> None:
    plain, guessing = make_runner(48), make_runner(48, draft_model_dir=head_dir)
    assert plain.kv_cache.layout() == guessing.kv_cache.layout()
    assert plain.numerics == guessing.numerics and plain.capacity == guessing.capacity
    assert plain.model_identity.digest == guessing.model_identity.digest


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"target_hidden_size": 48}, r"is for a hidden size of 48, .* has 32$"),
        ({"vocab_size": 62}, r"is for a vocabulary of 62, .* has one of 61$"),
        (
            {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
            r"takes hidden states behind 1, 2, 3 layers, .* has 2$",
        ),
        ({"max_position_embeddings": 128}, "knows 128 positions, sequences may have 256"),
        ({"speculators_model_type": "mlp"}, 'speculators_model_type: must be eagle3, not "mlp"'),
        ({"num_hidden_layers": 2}, "num_hidden_layers: only 1 is supported, not 2"),
        ({"draft_vocab_size": 70}, "draft_vocab_size: must be at most 61, not 70"),
        ({"hidden_size": 48, "target_hidden_size": 32}, "embed_tokens|no embedding"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_head_that_is_for_another_model_is_refused(
    make_runner: MakeRunner, tmp_path: Path, fields: dict[str, Any], problem: str
) -> None:
    head_dir = make_head(tmp_path, CONFIG, **fields, has_embedding=False)
    with pytest.raises(ModelError, match=f"draft_model: .*{problem}"):
        make_runner(48, draft_model_dir=head_dir)


def test_what_is_no_head_is_refused(make_runner: MakeRunner, tmp_path: Path) -> None:
    model_dir = make_target(tmp_path, CONFIG)
    with pytest.raises(ModelError, match=r"draft_model: .*this is no eagle3 head"):
        make_runner(48, draft_model_dir=model_dir)


def test_one_that_does_not_fit_says_how_much_is_missing(
    make_runner: MakeRunner, head_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.shared.engine.memory._gib", lambda num_bytes: f"{num_bytes} bytes")
    with pytest.raises(ModelError, match=r"draft_model: its weights take \d+ bytes.* missing"):
        make_runner(48, draft_model_dir=head_dir, host_memory_mib=1)
