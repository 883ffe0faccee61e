"""The demo and its draft model, or a head, on a GPU: answers are those without guesses, captured
chains guess what launched ones do, and nothing is compiled once they are ready."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baton.services.worker import messages as msg
from baton.services.worker.sequence_table import Recipient
from baton.services.worker.stepper import BatchLimits
from baton.shared.engine.batch import BatchRow, ChainRow
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.sampling import SamplingParams
from baton.shared.speculation import MTP
from tests.device import ROOT
from tests.gpu.conftest import DEMO, MakeRunner
from tests.gpu.test_no_late_compilation import forget_kernels
from tests.heads import fit_head, make_head
from tests.unit.worker.conftest import runners
from tests.unit.worker.drafting import AllOfThem, GuessingRunner
from tests.unit.worker.sim_worker import SimWorker

pytestmark = pytest.mark.gpu

WAYS = [
    SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True),
    SamplingParams(temperature=1.0, max_tokens=60, ignore_eos=True, seed=4),
    SamplingParams(
        temperature=0.8, top_p=0.9, presence_penalty=0.5, max_tokens=60, ignore_eos=True, seed=5
    ),
]
LENGTHS = (3, 90, 700, 16, 17, 255)
FEW = ((5, 3), (12, 90), (19, 16))
"""First tokens, and lengths, of a small model's prompts."""


def answers(
    runner: ModelRunner, prompts: list[list[int]], guesses: dict[Any, Any] | None = None
) -> tuple[list[list[int]], Any]:
    """`guesses`: gets them, by answer and how long it was."""
    guessing = GuessingRunner(runner)
    if guesses is not None:
        note_guesses(guessing, guesses)
    limits = BatchLimits(token_budget=512, max_num_seqs=8)
    worker = SimWorker("w", "ab" * 16, guessing, lambda _, mail: None, limits)  # type: ignore[arg-type]
    sequences = [
        Sequence(AttemptKey(f"r{number}", 0, 1), tuple(prompt), WAYS[number % len(WAYS)])
        for number, prompt in enumerate(prompts)
    ]
    for number, sequence in enumerate(sequences):
        worker.inbox.put(msg.StartDecode(sequence, Recipient(worker.gateway_stream, number), None))
    for _ in range(500):
        worker.engine.run_once(may_wait=False)
    assert worker.leftovers == {}
    guessing.check()
    return [sequence.output_token_ids for sequence in sequences], worker.counters


def note_guesses(guessing: GuessingRunner, guesses: dict[Any, Any]) -> None:
    guess = guessing.drafter.drafts

    def noting(wanted: Any) -> Any:
        drafts = guess(wanted)
        for (sequence, _), draft in zip(wanted, drafts, strict=True):
            guesses[sequence.key, sequence.num_tokens] = tuple(draft.token_ids)
        return drafts

    guessing.drafter.drafts = noting


def check(
    runner_of: Callable[[], ModelRunner],
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """What was counted."""
    import triton

    forget_kernels()
    runner = runner_of()
    names: list[str] = []

    def listen(*, src: Any, **_: Any) -> None:
        names.append(f"{getattr(src, 'name', src)} {getattr(src, 'constants', '')}")

    monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
    guessed, counters = answers(runner, prompts)
    assert not names, f"{len(names)} kernels were late, such as {names[0]}"
    params = [WAYS[number % len(WAYS)] for number in range(len(prompts))]
    assert guessed == PlainLoop(runner).generate(prompts, params)
    return counters


def fields_of(kind: str, directory: Path, make: MakeRunner) -> dict[str, Any]:
    """Of EngineConfig, for the demo with who guesses for it."""
    how: dict[str, Any] = {"dtype": "float32", "num_blocks": 400, "num_drafts": 4}
    how |= {"draft_kind": kind, "draft_model_dir": ROOT / "models" / "demo-draft"}
    if kind == "eagle3":
        config = json.loads((DEMO / "config.json").read_text())
        # What it is right about at times is what the model would say again.
        how["draft_model_dir"] = make_head(directory, config, draft_vocab_size=3000)
        fit_head(directory, make(DEMO, **how))
    return how


@pytest.mark.parametrize("kind", ["draft-model", "eagle3"])
def test_answers_are_those_without(
    make_gpu_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    how = fields_of(kind, tmp_path, make_gpu_runner)
    prompts = prompts_of(LENGTHS)
    counters = check(lambda: make_gpu_runner(DEMO, **how), prompts, monkeypatch)
    assert counters["drafted_tokens"] > counters["accepted_tokens"]
    assert counters["accepted_tokens"] > (counters["drafts"] if kind == "draft-model" else 0)


@pytest.mark.parametrize("kind", ["draft-model", "eagle3"])
def test_answers_are_those_without_where_guesses_come_behind_steps_in_flight(
    make_gpu_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """The chain is made while the model computes, and begins with what that draws."""
    how = fields_of(kind, tmp_path, make_gpu_runner)
    monkeypatch.setattr(AllOfThem, "pays", lambda *_: False)
    counters = check(lambda: make_gpu_runner(DEMO, **how), prompts_of(LENGTHS), monkeypatch)
    assert counters["drafts"] > 10


def test_guesses_are_checked_when_they_are_made(
    make_gpu_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """However late: the step that checks them is launched before they are."""
    how = fields_of("draft-model", tmp_path, make_gpu_runner)
    runner = make_gpu_runner(DEMO, **how)
    assert runner.draft is not None
    expected, at_once = answers(runner, prompts_of(LENGTHS))
    executor: Any = runner.draft.executor
    cuda: Any = torch.cuda
    launch = executor._chains.launch

    def launch_late(*arguments: Any) -> Tensor:
        # Some milliseconds, of the stream that guesses.
        cuda._sleep(10_000_000)
        return launch(*arguments)  # type: ignore[no-any-return]

    monkeypatch.setattr(executor._chains, "launch", launch_late)
    told, late = answers(runner, prompts_of(LENGTHS))
    assert told == expected
    for name in ("drafted_tokens", "accepted_tokens"):
        assert late[name] == at_once[name] > 0


@pytest.mark.parametrize("kind", ["draft-model", "eagle3"])
def test_captured_chains_guess_what_launched_ones_do(
    make_gpu_runner: MakeRunner, tmp_path: Path, kind: str
) -> None:
    how = fields_of(kind, tmp_path, make_gpu_runner)
    found = []
    for graphs in (True, False):
        runner = make_gpu_runner(DEMO, cuda_graphs=graphs, **how)
        guesses: dict[Any, Any] = {}
        told, _ = answers(runner, prompts_of(LENGTHS), guesses)
        assert chain_sizes(runner) == ([1, 2, 4, 8] if graphs else [])
        assert sum(map(len, guesses.values())) > 100
        found.append((told, guesses))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["draft-model", "eagle3"])
def test_no_chain_waits_for_a_kernel(
    make_gpu_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """Whatever the rows, what is new of them, and how many guesses are wanted."""
    import triton

    how = {**fields_of(kind, tmp_path, make_gpu_runner), "max_num_seqs": 40}
    forget_kernels()
    runner = make_gpu_runner(DEMO, **how)
    draft = runner.draft
    assert draft is not None
    states: tuple[Tensor, ...] = ()
    if draft.tapped is not None:
        shape = (5, len(draft.tapped.layers) * draft.tapped.hidden_size)
        states = (torch.zeros(shape, dtype=draft.tapped.dtype, device="cuda"),)
    names: list[str] = []
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda *, src, **_: names.append(str(src))
    )
    for num_rows in range(1, 41):
        handles = [draft.executor.open_row(WAYS[n % 2], 0) for n in range(num_rows)]
        chains = []
        for number, handle in enumerate(handles):
            num_new = 1 + (number if num_rows % 2 else 0) % 5
            row = BatchRow([7] * num_new, number, [[4 * number + n for n in range(4)]], WAYS[0], 0)
            row.handle = handle
            num_guesses = 1 + (number + num_rows) % draft.most_guesses
            chains.append(ChainRow(row, num_guesses, tuple(each[:num_new] for each in states)))
        guesses = draft.launch_chains(chains).result()
        assert list(map(len, guesses)) == [chain.num_guesses for chain in chains]
        for handle in handles:
            draft.executor.close_row(handle)
    assert not names, f"{len(names)} kernels were late, such as {names[0]}"


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    return [[5 + 7 * number + n % 900 for n in range(n)] for number, n in enumerate(lengths)]


def chain_sizes(runner: ModelRunner) -> list[int]:
    """Rows of chains that there are graphs for."""
    assert runner.draft is not None
    executor: Any = runner.draft.executor
    return [size for size, chain in executor._chains._chains.items() if chain.graphs_first]


@pytest.mark.parametrize("layers", ["layer ahead", "layer ahead, states"])
def test_a_layer_of_the_checkpoint_guesses(
    make_gpu_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layers: str
) -> None:
    """Over latents, in the model and in the layer; and over states."""
    model_dir = runners(lambda _: tmp_path)(8, layers)._config.model_dir
    how: dict[str, Any] = {"dtype": "float32", "num_blocks": 400, "num_drafts": 4}
    how |= {"draft_kind": MTP, "draft_model_dir": model_dir}
    prompts = [[(first + n) % 61 for n in range(length)] for first, length in FEW]
    counters = check(lambda: make_gpu_runner(model_dir, **how), prompts, monkeypatch)
    assert counters["drafted_tokens"] > counters["accepted_tokens"] > 10
