"""A smaller model guesses: answers are the answers without, and its cache is what it should be.

In the class `exact`, with real engines and a draft model whose tokens are sometimes the larger
one's: the same weights, but for noise, and one layer less.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from baton.services.worker.drafting import Drafting
from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.model_files.fields import ModelError
from baton.shared.sampling import SamplingParams
from baton.shared.tokenizer.compare import different_token
from tests.unit.worker.conftest import MakeRunner
from tests.unit.worker.drafting import AllOfThem, GuessingRunner
from tests.unit.worker.late_runner import LateRunner
from tests.unit.worker.network import Clock
from tests.unit.worker.simulation import Cluster
from tests.unit.worker.test_speculation import COPYING, PARAMS, PLAIN, Answers, OneWorker

MakeDraft = Callable[..., Path]


@pytest.fixture(scope="module")
def answers(make_runner: MakeRunner) -> Answers:
    return Answers(make_runner(64))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("engine_loop", "handoff"):
        monkeypatch.setattr(f"baton.services.worker.{module}.time", clock)
    return clock


@pytest.fixture(scope="module")
def make_draft(make_runner: MakeRunner, tmp_path_factory: pytest.TempPathFactory) -> MakeDraft:
    """A model like that of `make_runner(…, kind)`, with other fields in its config.json."""

    def make(kind: str = "full", noise: float = 0.02, **fields: Any) -> Path:
        model_dir = make_runner(8, kind)._config.model_dir
        draft_dir = tmp_path_factory.mktemp("draft")
        shutil.copytree(model_dir, draft_dir, dirs_exist_ok=True)
        config = json.loads((draft_dir / "config.json").read_text())
        (draft_dir / "config.json").write_text(json.dumps({**config, **fields}))
        weights = load_file(draft_dir / "model.safetensors")
        generator = torch.Generator().manual_seed(5)
        for weight in weights.values():
            weight += noise * torch.randn(weight.shape, generator=generator)
        save_file(weights, draft_dir / "model.safetensors")
        return draft_dir

    return make


@pytest.fixture(scope="module")
def draft_dir(make_draft: MakeDraft) -> Path:
    return make_draft()


@pytest.fixture
def make_guessing(make_runner: MakeRunner, draft_dir: Path) -> Callable[..., Any]:
    def make(num_blocks: int, *, num_drafts: int = 5, **how: Any) -> Any:
        how.setdefault("draft_model_dir", draft_dir)
        return GuessingRunner(make_runner(num_blocks, num_drafts=num_drafts, **how))

    return make


def submit_all(
    cluster: Cluster, answers: Answers, ways: Iterable[SamplingParams] = PARAMS
) -> list[Any]:
    """In each of these ways of drawing, one that is handed over and one that the worker computes
    itself."""
    return [
        cluster.submit(prompt, params, answers.to(prompt, params), is_local=is_local)
        for number, params in enumerate(ways)
        for prompt in ([PLAIN] if number % 2 else [COPYING])
        for is_local in (False, True)
    ]


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("num_blocks", [120, 16], ids=["", "too few blocks"])
def test_mixed_batches_in_every_way_of_drawing(
    make_runner: MakeRunner,
    make_guessing: Callable[..., Any],
    answers: Answers,
    clock: Clock,
    num_blocks: int,
    runs_ahead: bool,
) -> None:
    """Chunked prompts, hits, answers that give way and come again; prompts that are handed over
    are seen before they are there."""
    decode = make_guessing(num_blocks)
    if runs_ahead:
        decode._runner = LateRunner(decode._runner)
    cluster = Cluster({"prefill": make_runner(num_blocks), "decode": decode}, clock)
    requests = submit_all(cluster, answers)
    cluster.settle()
    assert [request.token_ids for request in requests] == [each.expected for each in requests]
    counters = cluster.network.workers["decode"].counters
    assert counters["accepted_tokens"] > counters["drafts"] / 2 > 20
    assert counters["drafted_tokens"] > counters["accepted_tokens"]
    assert (counters["preemptions"] > 0) == (num_blocks == 16)
    decode.check()


@pytest.mark.parametrize("num_rounds", [4, 5, 6, 7])
def test_a_decode_worker_that_dies_after_so_many_rounds(
    make_runner: MakeRunner,
    make_guessing: Callable[..., Any],
    answers: Answers,
    clock: Clock,
    num_rounds: int,
) -> None:
    """However long the accepted chain was, and whether the next one guesses or not."""
    runners = {"prefill": make_runner(64), "decode": make_guessing(64)}
    cluster = Cluster(runners, clock)
    network, params = cluster.network, PARAMS[num_rounds % len(PARAMS)]
    expected = answers.to(COPYING, params)
    request = cluster.submit(COPYING, params, expected)
    for _ in range(num_rounds):
        network.go_round()
    network._runners["decode"] = make_runner(64) if num_rounds % 2 else make_guessing(64)
    network.kill("decode")
    cluster.settle()
    assert request.token_ids == expected and request.num_attempts == 2


@pytest.mark.parametrize("kind", ["windowed", "one pool", "two pools"])
def test_models_whose_layers_have_windows(
    make_runner: MakeRunner, make_draft: MakeDraft, make_guessing: Callable[..., Any], kind: str
) -> None:
    """Whose windows differ from the model's: its blocks are given back by its own rules."""
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    expected = Answers(make_runner(64, kind)).to(PLAIN, params)
    draft_dir = make_draft(kind, noise=0.01, sliding_window=8)
    runner = make_guessing(64, kind=kind, draft_model_dir=draft_dir)
    worker = OneWorker(runner)
    assert worker.answer(Sequence(AttemptKey("r", 0, 1), PLAIN, params)) == expected
    assert worker.counters["accepted_tokens"] > 10
    runner.check()


def test_a_model_whose_layers_keep_states(
    make_runner: MakeRunner, make_guessing: Callable[..., Any]
) -> None:
    """By one whose layers do not, and which is right by chance."""
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    expected = Answers(make_runner(64, "states")).to(PLAIN, params)
    runner = make_guessing(64, kind="states")
    worker = OneWorker(runner)
    assert worker.answer(Sequence(AttemptKey("r", 0, 1), PLAIN, params)) == expected
    assert worker.counters["drafted_tokens"] > worker.counters["accepted_tokens"] > 0
    runner.check()


def test_the_model_itself_guesses_all_of_it(
    make_runner: MakeRunner, make_draft: MakeDraft, make_guessing: Callable[..., Any]
) -> None:
    """Drawn with the same noise: no guess falls, whatever the temperature, and with penalties that
    count guesses as if they had been drawn."""
    twin = make_draft(noise=0.0)
    for params in PARAMS:
        expected = Answers(make_runner(64)).to(PLAIN, params)
        runner = make_guessing(64, draft_model_dir=twin)
        worker = OneWorker(runner)
        assert worker.answer(Sequence(AttemptKey("r", 0, 1), PLAIN, params)) == expected
        counters = worker.counters
        assert counters["accepted_tokens"] == counters["drafted_tokens"] >= 18
        runner.check()


def test_who_does_not_want_it_gets_none(
    make_guessing: Callable[..., Any], answers: Answers
) -> None:
    params = dataclasses.replace(PARAMS[0], speculate=False)
    runner = make_guessing(64)
    worker = OneWorker(runner)
    assert worker.answer(Sequence(AttemptKey("r", 0, 1), PLAIN, params)) == answers.to(
        PLAIN, params
    )
    assert worker.counters["drafts"] == 0 and not runner.drafter._known


def test_what_a_client_predicts_comes_first(
    make_guessing: Callable[..., Any], answers: Answers
) -> None:
    expected = answers.to(PLAIN, PARAMS[0])
    worker = OneWorker(make_guessing(64))
    prediction = tuple(expected)
    sequence = Sequence(AttemptKey("r", 0, 1), PLAIN, PARAMS[0], prediction_token_ids=prediction)
    assert worker.answer(sequence) == expected
    assert sum(accepted for accepted, _ in worker.checked) > 10


def test_it_catches_up_after_steps_without_guesses(
    make_guessing: Callable[..., Any], answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with k = 0 for a while, and only where guesses may pay or are wanted."""
    monkeypatch.setattr("baton.services.decode.chains.FEW", 4)

    class Moody(AllOfThem):
        num_steps, is_paying, has_begun, told = 0, False, False, 0

        def wanted(self, num_rows: int, sequences: Any) -> list[int]:
            self.num_steps += 1
            self.has_begun = self.num_steps > 12
            return [self._most if self.has_begun else 0] * len(sequences)

        def expects(self, num_rows: int) -> bool:
            return self.is_paying

        def pays(self, num_rows: int, sequences: Any) -> bool:
            return self.has_begun

        def spent(self, seconds: float) -> None:
            self.told += 1

    for pays in (False, True):
        runner, lengths = make_guessing(64), Moody(5)
        lengths.is_paying = pays
        runner.drafting = Drafting(runner.drafter, lengths, 5)
        worker = OneWorker(runner)
        sequence = Sequence(AttemptKey("r", 0, 1), PLAIN, PARAMS[0])
        assert worker.answer(sequence) == answers.to(PLAIN, PARAMS[0])
        assert worker.counters["accepted_tokens"] > 0
        assert (lengths.told == 0) == pays, "what does not pay is charged"
        runner.check()


def test_nothing_new_is_nothing_to_guess_behind(
    make_runner: MakeRunner,
    make_guessing: Callable[..., Any],
    answers: Answers,
    clock: Clock,
) -> None:
    """Where guesses are tried though none are expected to pay, no step in flight is waited for: a
    sequence may be asked about twice before a token more of it is known."""

    class Trying(AllOfThem):
        def pays(self, num_rows: int, sequences: Any) -> bool:
            return False

    decode = make_guessing(64)
    decode.drafting = Drafting(decode.drafter, Trying(5), 5)
    decode._runner = LateRunner(decode._runner)
    cluster = Cluster({"prefill": make_runner(64), "decode": decode}, clock)
    request = cluster.submit(PLAIN, PARAMS[0], answers.to(PLAIN, PARAMS[0]))
    cluster.settle()
    assert request.token_ids == request.expected and request.num_attempts == 1
    assert cluster.network.workers["decode"].counters["drafts"] > 0
    decode.check()


@pytest.mark.parametrize("expects", [False, True])
def test_a_worker_that_only_waits_for_blocks_does_not_stand_still(
    make_runner: MakeRunner,
    make_guessing: Callable[..., Any],
    answers: Answers,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    expects: bool,
) -> None:
    """A gateway gives up a worker that says it is busy and takes no step."""
    monkeypatch.setattr("baton.services.decode.chains.FEW", 4)

    class Expecting(AllOfThem):
        def expects(self, num_rows: int) -> bool:
            return expects

    decode = make_guessing(64)
    decode.drafting = Drafting(decode.drafter, Expecting(5), 5)
    cluster = Cluster({"prefill": make_runner(64), "decode": decode}, clock)
    network = cluster.network
    request = cluster.submit(PLAIN, PARAMS[0], answers.to(PLAIN, PARAMS[0]))
    engine = network.workers["decode"].engine
    for _ in range(12):
        # No pull is ever finished.
        for name in network.workers:
            for channel in network.busy_channels:
                while network.channels[channel]:
                    network.deliver(channel)
            network.step(name)
    assert engine.num_sequences == 1 and not engine.is_busy
    assert (engine.num_steps > 0) == expects
    cluster.settle()
    assert request.token_ids == request.expected
    decode.check()


def test_it_is_no_part_of_what_workers_must_have_in_common(
    make_runner: MakeRunner, draft_dir: Path
) -> None:
    plain, guessing = make_runner(48), make_runner(48, num_drafts=4, draft_model_dir=draft_dir)
    assert plain.kv_cache.layout() == guessing.kv_cache.layout()
    assert plain.numerics == guessing.numerics and plain.capacity == guessing.capacity
    assert plain.model_identity.digest == guessing.model_identity.digest
    assert guessing.draft is not None
    assert guessing.draft.capacity.num_blocks == (48,), "for as many tokens"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"vocab_size": 62}, r"draft_model: .* has a vocabulary of 62, .* one of 61$"),
        (
            {"max_position_embeddings": 128},
            r"draft_model: .* knows 128 positions, sequences may have 256; set max_model_len",
        ),
    ],
)
def test_a_model_that_cannot_guess_is_refused(
    make_runner: MakeRunner, make_draft: MakeDraft, fields: dict[str, Any], problem: str
) -> None:
    draft_dir = make_draft(**fields)
    with pytest.raises(ModelError, match=problem):
        make_runner(48, num_drafts=4, draft_model_dir=draft_dir)
    if "max_position_embeddings" in fields:
        make_runner(48, num_drafts=4, draft_model_dir=draft_dir, max_model_len=128)


def test_one_that_is_not_there_is_named(make_runner: MakeRunner, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^draft_model: .*/none: no such model directory"):
        make_runner(48, num_drafts=4, draft_model_dir=tmp_path / "none")


def test_one_that_does_not_fit_says_how_much_is_missing(
    make_runner: MakeRunner, draft_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.shared.engine.memory._gib", lambda num_bytes: f"{num_bytes} bytes")
    with pytest.raises(ModelError, match=r"draft_model: its weights take \d+ bytes.* missing"):
        make_runner(48, num_drafts=4, draft_model_dir=draft_dir, host_memory_mib=1)


def test_other_tokens_are_named(tmp_path: Path) -> None:
    for name, words in (("model", ["a", "b", "c"]), ("draft", ["a", "c", "b"]), ("none", [])):
        (tmp_path / name).mkdir()
        if words:
            vocabulary = {word: token_id for token_id, word in enumerate(words)}
            tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="a"))
            tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    draft, model = tmp_path / "draft", tmp_path / "model"
    assert different_token(draft, model) == (1, "'c'", "'b'")
    assert different_token(model, model) is None
    assert different_token(tmp_path / "none", model) is None


@pytest.mark.parametrize("fails_at", ["drafts", "catch_up"])
def test_a_step_of_who_guesses_that_fails_costs_guesses_only(
    make_runner: MakeRunner,
    make_guessing: Callable[..., Any],
    answers: Answers,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fails_at: str,
) -> None:
    """Of the sequences that it was for; those that come later are guessed for again."""
    monkeypatch.setattr("baton.services.decode.chains.FEW", 4)
    decode = make_guessing(64)
    launch, num_failures = decode.draft.launch, 0

    def fail_once(rows: Any) -> Any:
        nonlocal num_failures
        if not num_failures and (rows[0].sampling is None) == (fails_at == "catch_up"):
            num_failures += 1
            raise torch.OutOfMemoryError("no room for a guess")
        return launch(rows)

    monkeypatch.setattr(decode.draft, "launch", fail_once)
    cluster = Cluster({"prefill": make_runner(64), "decode": decode}, clock)
    request = cluster.submit(PLAIN, PARAMS[0], answers.to(PLAIN, PARAMS[0]))
    cluster.settle()
    assert request.token_ids == request.expected and request.num_attempts == 1
    assert num_failures == 1 and decode.drafting.num_given_up == 1
    assert "these sequences go on without" in caplog.text and "no room for" in caplog.text
    counters = cluster.network.workers["decode"].counters
    assert counters["drafts"] == 0
    request = cluster.submit(COPYING, PARAMS[1], answers.to(COPYING, PARAMS[1]))
    cluster.settle()
    assert request.token_ids == request.expected and counters["drafts"] > 0
    decode.check()
    assert not decode.drafting._given_up


def test_many_new_tokens_at_once_are_no_more_than_it_has_memory_for(
    make_guessing: Callable[..., Any], answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short prompts are computed with the first chains: of so many sequences as fit into a step."""
    monkeypatch.setattr("baton.services.decode.chains.CHUNK", 30)
    runner = make_guessing(64)
    launch, most = runner.draft.launch, 0

    def counting(rows: Any) -> Any:
        nonlocal most
        most = max(most, sum(row.num_tokens - 1 for row in rows))
        return launch(rows)

    monkeypatch.setattr(runner.draft, "launch", counting)
    params = dataclasses.replace(PARAMS[0], ignore_eos=True)
    sequences = [Sequence(AttemptKey(f"r{i}", 0, 1), PLAIN, params) for i in range(4)]
    drafts = runner.drafter.drafts([(sequence, 3) for sequence in sequences])
    assert [len(draft.token_ids) for draft in drafts] == [3, 0, 0, 0] and 15 < most <= 30
    drafts = runner.drafter.drafts([(sequence, 3) for sequence in sequences[1:]])
    assert [len(draft.token_ids) for draft in drafts] == [3, 0, 0]
    for sequence in sequences:
        runner.drafter.forget(sequence)
    runner.check()
