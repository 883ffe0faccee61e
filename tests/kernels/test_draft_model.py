"""A smaller model guesses over the Triton kernels: each guess goes on from where the one before
lies, and answers are those without guesses."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.services.worker import messages as msg
from baton.services.worker.sequence_table import Recipient
from baton.services.worker.stepper import BatchLimits
from baton.shared.engine.coming_guesses import DeviceChains
from baton.shared.engine.draft_model import DraftModel
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.sampling import SamplingParams
from tests.heads import make_head
from tests.kernels.test_engine import SMALL, maker
from tests.unit.worker.drafting import AllOfThem, GuessingRunner
from tests.unit.worker.sim_worker import SimWorker

# As in test_engine.py.
pytestmark = [
    pytest.mark.usefixtures("few_programs"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning"),
]

WAYS = [
    SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0.8, top_k=20, max_tokens=9, ignore_eos=True, seed=4),
    SamplingParams(
        temperature=0.9, presence_penalty=1.0, max_tokens=9, ignore_eos=True, seed=5, logprobs=2
    ),
]
LENGTHS = (3, 18, 6)


def twin_of(model_dir: Path, directory: Path, noise: float) -> Path:
    shutil.copytree(model_dir, directory)
    weights = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for weight in weights.values():
        weight += noise * torch.randn(weight.shape, generator=generator)
    save_file(weights, directory / "model.safetensors")
    return directory


def test_answers_are_those_without(tmp_path: Path, device: torch.device) -> None:
    (tmp_path / "model").mkdir()
    make = maker(tmp_path / "model", SMALL)
    draft_dir = twin_of(tmp_path / "model", tmp_path / "draft", 0.02)
    prompts = prompts_of(LENGTHS)
    runner = make("triton", device, num_drafts=3, draft_model_dir=draft_dir)
    expected = PlainLoop(runner).generate(prompts, WAYS)
    answers, _, counters = guessed(runner, prompts, WAYS)
    assert answers == expected
    assert counters["drafted_tokens"] > counters["accepted_tokens"] > 8


def test_a_head_guesses_what_it_guesses_by_plain_torch(
    tmp_path: Path, device: torch.device
) -> None:
    """By states of steps with chunks and of those without, its own and those of the model."""
    (tmp_path / "model").mkdir()
    make = maker(tmp_path / "model", SMALL)
    layers: dict[str, Any] = {"eagle_aux_hidden_state_layer_ids": [0, 1]}
    head_dir = make_head(tmp_path / "head", SMALL, draft_vocab_size=50, **layers)
    how = {"num_drafts": 2, "draft_model_dir": head_dir, "draft_kind": "eagle3"}
    prompts, ways = prompts_of((3, 6)), [replace(way, max_tokens=3) for way in WAYS[1:]]
    runner = make("triton", device, **how)
    expected = PlainLoop(runner).generate(prompts, ways)
    answers, guesses, counters = guessed(runner, prompts, ways)
    assert answers == expected and counters["drafted_tokens"] > 1
    assert guesses == guessed(make("torch", torch.device("cpu"), **how), prompts, ways)[1]


def test_the_step_that_checks_guesses_does_not_wait_for_them(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    make = maker(tmp_path / "model", SMALL)
    runner = make("triton", device, num_drafts=2, draft_model_dir=tmp_path / "model")
    said: list[str] = []

    def saying(owner: Any, name: str, word: str) -> None:
        usual = getattr(owner, name)

        def say(*arguments: Any) -> Any:
            said.append(word)
            return usual(*arguments)

        monkeypatch.setattr(owner, name, say)

    saying(DraftModel, "launch_chains", "guess")
    saying(DeviceChains, "told", "look")
    saying(ModelRunner, "launch", "check")
    prompts, ways = prompts_of((3, 6)), [replace(way, max_tokens=7) for way in WAYS[:2]]
    answers, guesses, counters = guessed(runner, prompts, ways, notes=False)
    assert answers == PlainLoop(runner).generate(prompts, ways) and not guesses
    assert counters["accepted_tokens"] > 4
    places = [place for place, word in enumerate(said) if word == "guess"]
    assert len(places) > 1 and all(said[place + 1] == "check" for place in places)
    assert "look" in said


@pytest.mark.parametrize("kind", ["draft-model", "eagle3"])
def test_guesses_behind_a_step_in_flight_come_behind_what_it_draws(
    tmp_path: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """That one is guessed as well: where few guesses are tried, as they seldom stood, nobody waits
    for it. Of as many as a step checks, behind as many, there are none."""
    (tmp_path / "model").mkdir()
    make = maker(tmp_path / "model", SMALL)
    draft_dir = draft_dir_of(kind, tmp_path)
    runner = make("triton", device, num_drafts=1, draft_model_dir=draft_dir, draft_kind=kind)
    # As on a GPU.
    runner.steps_ahead = 1
    monkeypatch.setattr(AllOfThem, "pays", lambda *_: False)
    prompts, ways = prompts_of((3,)), [replace(WAYS[0], max_tokens=8)]
    answers, guesses, counters = guessed(runner, prompts, ways)
    assert answers == PlainLoop(runner).generate(prompts, ways)
    assert counters["drafts"] > 1 and counters["drafted_tokens"] == counters["drafts"]
    assert max(map(len, guesses.values())) == 2


@pytest.mark.parametrize("kind", ["draft-model", "eagle3"])
def test_a_guess_that_fell_is_no_token_to_go_on_from(
    tmp_path: Path, device: torch.device, kind: str
) -> None:
    """It lies where the token is that was drawn instead."""
    (tmp_path / "model").mkdir()
    make = maker(tmp_path / "model", SMALL)
    how = {"num_drafts": 1, "draft_model_dir": draft_dir_of(kind, tmp_path), "draft_kind": kind}
    prompts, ways = prompts_of((3,)), [replace(WAYS[0], max_tokens=6)]
    plain, expected, counters = guessed(make("torch", torch.device("cpu"), **how), prompts, ways)
    assert counters["drafted_tokens"] > counters["accepted_tokens"]
    answers, guesses, _ = guessed(make("triton", device, **how), prompts, ways)
    assert answers == plain and guesses == expected


def draft_dir_of(kind: str, directory: Path) -> Path:
    """Who guesses, right at times, for the model in `directory`."""
    if kind == "eagle3":
        layers: dict[str, Any] = {"eagle_aux_hidden_state_layer_ids": [0, 1]}
        return make_head(directory / "draft", SMALL, draft_vocab_size=50, **layers)
    return twin_of(directory / "model", directory / "draft", 0.1)


def prompts_of(lengths: Seq[int]) -> list[list[int]]:
    return [random.Random(n).choices(range(SMALL["vocab_size"]), k=n) for n in lengths]


def guessed(
    runner: ModelRunner, prompts: list[list[int]], ways: list[SamplingParams], *, notes: bool = True
) -> tuple[list[list[int]], dict[Any, Any], dict[str, int]]:
    """Answers; guesses, by answer and how long it was, if they are noted; counters."""
    guessing = GuessingRunner(runner)
    limits = BatchLimits(token_budget=32, max_num_seqs=4)
    worker = SimWorker("w", "ab" * 16, guessing, lambda _, mail: None, limits)  # type: ignore[arg-type]
    guesses: dict[Any, Any] = {}
    guess = guessing.drafter.drafts

    def noting(wanted: Any) -> Any:
        drafts = guess(wanted)
        for (sequence, _), draft in zip(wanted, drafts, strict=True):
            guesses[sequence.key, sequence.num_tokens] = tuple(draft.token_ids)
        return drafts

    if notes:
        guessing.drafter.drafts = noting
    sequences = [
        Sequence(AttemptKey(f"r{number}", 0, 1), tuple(prompt), params)
        for number, (prompt, params) in enumerate(zip(prompts, ways, strict=True))
    ]
    for number, sequence in enumerate(sequences):
        worker.inbox.put(msg.StartDecode(sequence, Recipient(worker.gateway_stream, number), None))
    for _ in range(40):
        worker.engine.run_once(may_wait=False)
        if all(sequence.finish_reason for sequence in sequences) and not worker.engine.is_busy:
            break
    assert worker.leftovers == {}
    guessing.check()
    return [list(each.output_token_ids) for each in sequences], guesses, dict(worker.counters)
