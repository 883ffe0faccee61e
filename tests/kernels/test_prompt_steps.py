"""Steps with prompt chunks from graphs, in the interpreter with a stand-in for the graphs, against
the torch reference; on a GPU with graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.kernels.latent_expand import STRETCH_TOKENS
from baton.shared.engine import prompt_columns, prompt_steps
from baton.shared.engine.batch import Batch, BatchRow, RowHandle, WantedLogprobs
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.device_executor import DeviceExecutor
from baton.shared.engine.executor import Tapped
from baton.shared.engine.host_executor import HostExecutor
from baton.shared.engine.kv_cache import KvCache
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.kv.drawn import Drawn
from baton.shared.sampling import SamplingParams
from tests.kernels.stand_in_graphs import StandInGraphs
from tests.kernels.test_engine import CONFIG, SMALL, Make, maker, tokens
from tests.unit.engine.tiny_models import TINY_MODELS, make_tiny

pytestmark = [
    pytest.mark.usefixtures("few_programs"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning"),
]
MOST_TOKENS = 32
SHAPED = SamplingParams(
    temperature=0.8, seed=4, max_tokens=9, repetition_penalty=1.3, logit_bias=((5, 1.0),)
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=9)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory.mktemp("tiny"), SMALL)


@pytest.fixture(scope="module")
def reference(make: Make) -> ModelRunner:
    return make("torch", torch.device("cpu"))


@pytest.fixture
def runner(make: Make, device: torch.device) -> ModelRunner:
    made = make("triton", device)
    if device.type == "cpu":
        captured(made, StandInGraphs())
    return made


def captured(runner: ModelRunner, graphs: StandInGraphs) -> None:
    executor: Any = runner._executor
    with torch.inference_mode():
        executor.capture_prompts(MOST_TOKENS, graphs)


class Answer:
    """A sequence, and what the reference says of it."""

    def __init__(
        self, reference: ModelRunner, number: int, length: int, sampling: SamplingParams
    ) -> None:
        self.prompt = tokens(length, number)
        self.sampling = sampling
        # Groups may share a pool.
        firsts = [5 * number + 20 * place for place in range(len(reference.groups))]
        self.table = [
            list(range(first, first + 5)) if group.spec.grows else [number]
            for group, first in zip(reference.groups, firsts, strict=True)
        ]
        self.expected: list[Drawn] = []
        self.handle: RowHandle | None = None
        handle = reference.open_row(sampling, 0, Known(self.prompt, self.expected))
        row = BatchRow(self.prompt, 0, self.table, sampling, 0, handle)
        for _ in range(5):
            [[drawn]] = reference.forward(Batch([row]))
            self.expected.append(drawn)
            at = length + len(self.expected) - 1
            row = BatchRow([drawn.token_id], at, self.table, sampling, 0, handle)
        reference.close_row(handle)
        self.drawn: list[Drawn] = []

    def open(self, runner: ModelRunner) -> Answer:
        self.handle = runner.open_row(self.sampling, 0, Known(self.prompt, self.drawn))
        return self

    def chunk(self, start: int, end: int) -> BatchRow:
        draws = self.sampling if end == len(self.prompt) else None
        return BatchRow(self.prompt[start:end], start, self.table, draws, 0, self.handle)

    def next(self, num_ahead: int = 0) -> BatchRow:
        at = len(self.prompt) + len(self.drawn) - 1 + num_ahead
        return BatchRow(None, at, self.table, self.sampling, 0, self.handle)


Step = list[tuple[Answer, BatchRow]]


class Known:
    num_asked_tokens = 0
    banned_sequences = ()

    def __init__(self, prompt: list[int], drawn: list[Drawn]) -> None:
        self._prompt, self._drawn = prompt, drawn
        self.num_asked_tokens = len(prompt)

    def token_slice(self, start: int, end: int) -> list[int]:
        return [*self._prompt, *(each.token_id for each in self._drawn)][start:end]


def test_chunks_and_decode_rows_of_any_mixture(
    runner: ModelRunner, reference: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole prompts, chunks behind prefixes, decode rows with penalties and without, steps launched
    ahead; a step whose chunk draws nothing; one that is longer than any graph; what changed goes
    along, or is too much for that."""
    a = Answer(reference, 0, 45, GREEDY).open(runner)
    b = Answer(reference, 1, 7, SHAPED).open(runner)
    c = Answer(reference, 2, 19, SamplingParams(temperature=0.9, top_k=20, seed=3)).open(runner)
    d = Answer(reference, 3, 20, SHAPED).open(runner)
    steps: list[Step] = [
        [(a, a.chunk(0, 16))],
        [(b, b.chunk(0, 7)), (a, a.chunk(16, 33))],
        [(a, a.chunk(33, 45)), (b, b.next(1))],
        [(b, b.next(2)), (c, c.chunk(0, 3)), (a, a.next(1))],
        [(c, c.chunk(3, 19)), (a, a.next(2)), (b, b.next(3))],
        [(d, d.chunk(0, 20)), (c, c.next(1)), (b, b.next(4)), (a, a.next(3))],
    ]
    usual = prompt_columns.MOST_UPDATES

    def room_for_changes(number: int) -> None:
        monkeypatch.setattr(prompt_steps, "MOST_UPDATES", 2 if number % 2 else usual)

    one_ahead(runner, steps, before=room_for_changes)
    monkeypatch.setattr(prompt_steps, "MOST_UPDATES", usual)
    counts = runner.num_prompt_steps
    assert (counts.captured, counts.launched) == (6, 0)
    # Which a graph has no room for.
    e = Answer(reference, 4, 44, GREEDY).open(runner)
    took([(a, a.next()), (e, e.chunk(0, 44))], runner.launch(Batch([a.next(), e.chunk(0, 44)])))
    asks = e.next()
    took([(e, asks)], runner.launch(Batch([asks])))
    assert counts.launched == (runner.device.type == "cpu")
    for each in (a, b, c, d, e):
        assert each.drawn == each.expected[: len(each.drawn)] and each.drawn


def one_ahead(
    runner: ModelRunner, steps: list[Step], before: Callable[[int], None] = lambda number: None
) -> None:
    """Each step is launched before the one before it is read; `before` is told its number."""
    in_flight: list[tuple[Step, Any]] = []
    for number, step in enumerate(steps):
        before(number)
        in_flight.append((step, runner.launch(Batch([row for _, row in step]))))
        if len(in_flight) > 1:
            took(*in_flight.pop(0))
    took(*in_flight.pop(0))


def took(step: Step, launched: Any) -> None:
    for (answer, _), drawn in zip(step, launched.result(), strict=True):
        answer.drawn += drawn


def test_something_runs_between_the_plan_and_the_attention_of_wanted_tokens(
    runner: ModelRunner, reference: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That overlaps with the kernel before it, which therefore may not be what plans it."""
    if runner.device.type != "cpu":
        pytest.skip("what was captured is not launched again")
    executor: Any = runner._executor
    steps, finish, queries = executor._prompts, executor._prompts._model.finish, []

    def spy(halfway: Any, *rest: Any) -> Any:
        queries.append(halfway.query)
        return finish(halfway, *rest)

    monkeypatch.setattr(steps._model, "finish", spy)
    a = Answer(reference, 0, 20, GREEDY).open(runner)
    took([(a, a.chunk(0, 20))], runner.launch(Batch([a.chunk(0, 20)])))
    assert a.drawn == a.expected[:1]
    [query] = queries
    assert query.data_ptr() != steps._halfway.query.data_ptr(), "copied behind the plan"


def test_what_no_graph_is_for(
    make: Make, reference: ModelRunner, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """Too little memory for the larger graphs; logprobs of a prompt; rows with drafts beside it."""
    runner = make("triton", device, num_drafts=2, prompt_graphs=False)
    caplog.clear()
    with caplog.at_level("INFO"):
        captured(runner, StandInGraphs(num_refused=2))
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert fields_of(caplog.records[0])["sizes"] == "16 16+4"
    assert fields_of(caplog.records[1])["missing"] == "32+0 32+4"
    executor: Any = runner._executor
    a = Answer(reference, 0, 19, GREEDY).open(runner)
    b = Answer(reference, 1, 7, GREEDY).open(runner)

    def run(*rows: tuple[Answer, BatchRow], by_graph: bool) -> None:
        before = executor.num_prompt_steps.captured
        took(list(rows), runner.launch(Batch([row for _, row in rows])))
        assert executor.num_prompt_steps.captured - before == by_graph

    run((b, b.chunk(0, 7)), by_graph=True)
    asks = a.chunk(0, 6)
    asks.prompt_logprobs = WantedLogprobs(0, a.prompt[1:6], 1)
    run((a, asks), (b, b.next()), by_graph=False)
    guesses = b.next()
    guesses.draft_ids = [b.expected[2].token_id]
    run((a, a.chunk(6, 10)), (b, guesses), by_graph=False)
    run((a, a.chunk(10, 19)), (b, b.next()), by_graph=True)
    e = Answer(reference, 2, 18, GREEDY).open(runner)
    run((e, e.chunk(0, 18)), (a, a.next()), by_graph=False)
    for each in (a, b, e):
        assert each.drawn == each.expected[: len(each.drawn)] and each.drawn


@pytest.mark.parametrize("to_the_end", [False, True])
def test_hidden_states_are_told_of_steps_from_graphs(
    make: Make, reference: ModelRunner, device: torch.device, to_the_end: bool
) -> None:
    """To who guesses by them; those behind the last layer are of steps that are launched."""
    layers = (0, 1) if to_the_end else (0,)
    tapped = Tapped(layers, CONFIG["hidden_size"], torch.float32, to_the_end=to_the_end)
    runner = make("triton", device, prompt_graphs=False)
    shape = {"num_heads": 2, "vocab_size": CONFIG["vocab_size"], "max_model_len": 160}
    how: dict[str, Any] = {**shape, "tapped": tapped}
    cache = KvCache(runner.arrangement, [40], 16, torch.float32, device=device)
    by_graphs = DeviceExecutor(
        runner._model, cache, device, **how, max_num_seqs=4, captures_prompts=True
    )
    by_host = HostExecutor(
        reference._model,
        KvCache(runner.arrangement, [40], 16, torch.float32),
        reference.device,
        **how,
        min_rows=16,
    )
    batches = [
        [BatchRow(tokens(5, 0), 0, [[0]]), BatchRow(tokens(9, 1), 0, [[1]], GREEDY)],
        [
            BatchRow(tokens(1, 2), 9, [[1]], GREEDY),
            BatchRow(tokens(3, 3), 0, [[2]], GREEDY),
            BatchRow(tokens(7, 4), 5, [[0]]),
        ],
    ]
    with torch.inference_mode():
        graphs: Any = StandInGraphs() if device.type == "cpu" else None
        by_graphs.capture_prompts(MOST_TOKENS, graphs)
        for rows in batches:
            steps = [each.launch(Batch(rows)) for each in (by_graphs, by_host)]
            steps[0].result()
            for number, row in enumerate(rows):
                ours, theirs = (each.taps(number) for each in steps)
                assert ours is not None and len(ours) == row.num_tokens
                torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)
    counts = by_graphs.num_prompt_steps
    assert (counts.captured, counts.launched) == ((0, 2) if to_the_end else (2, 0))


STATES = {
    "a delta rule beside attention": (
        "qwen3_5_text",
        {**TINY_MODELS["qwen3_5_text"]["as they come"], "num_hidden_layers": 2}
        | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "mamba2 alone": ("mamba2", TINY_MODELS["mamba2"]["as they come"]),
    "both in one layer": (
        "falcon_h1",
        {**TINY_MODELS["falcon_h1"]["every multiplier"], "num_hidden_layers": 1},
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_layers_that_keep_states(name: str, tmp_path: Path, device: torch.device) -> None:
    """States go on from step to step whatever else is there, those in the middle of chunks are kept
    where they are asked for, and no other slot is written; too many chunks, or kept states, for a
    graph."""
    model_type, fields = STATES[name]
    make_tiny(tmp_path, model_type, {**fields, "vocab_size": CONFIG["vocab_size"]})
    how: dict[str, Any] = {"num_blocks": 40, "max_num_seqs": 4, "state_checkpoints": 5}
    config = EngineConfig(tmp_path, "cpu", "float32", kernels="torch", **how)
    reference = ModelRunner(config)
    runner = ModelRunner(replace(config, device=device.type, kernels="triton"))
    if device.type == "cpu":
        captured(runner, StandInGraphs())
    for state in of_slots(runner):
        state.fill_(float("nan"))
    a, c = (Answer(reference, number, length, GREEDY) for number, length in ((0, 45), (2, 19)))
    b, d = (Answer(reference, number, length, SHAPED) for number, length in ((1, 7), (3, 20)))
    for each in (a, b, c, d):
        each.open(runner)
    kept = c.chunk(3, 19)
    kept.keeps = [(12, keeping(runner, 5)), (16, keeping(runner, 6))]
    steps = [
        [(a, a.chunk(0, 16))],
        [(b, b.chunk(0, 7)), (a, a.chunk(16, 33))],
        [(a, a.chunk(33, 45)), (b, b.next(1))],
        [(b, b.next(2)), (c, c.chunk(0, 3)), (a, a.next(1))],
        [(c, kept), (a, a.next(2)), (b, b.next(3))],
        [(d, d.chunk(0, 20)), (c, c.next(1)), (b, b.next(4)), (a, a.next(3))],
    ]
    one_ahead(runner, steps)
    counts = runner.num_prompt_steps
    assert (counts.captured, counts.launched) == (6, 0)
    for each in (a, b, c, d):
        assert each.drawn == each.expected[: len(each.drawn)] and each.drawn
    for slot, num_tokens in ((5, 15), (6, 19)):
        reference.forward(Batch([BatchRow(c.prompt[:num_tokens], 0, c.table)]))
        for own, of_reference in zip(of_slots(runner), of_slots(reference), strict=True):
            # Some places of a slot are of no use.
            error = (own[slot].cpu().nan_to_num() - of_reference[2]).abs().max()
            assert float(error) < 1e-4 * float(of_reference[2].abs().max())
    for state in of_slots(runner):
        assert state[[4, 7, 8]].isnan().all(), "nobody's"
    many = BatchRow(a.prompt[:10], 0, a.table)
    many.keeps = [(num_tokens, keeping(runner, 7)) for num_tokens in range(1, 6)]
    runner.forward(Batch([many]))
    assert counts.launched == (runner.device.type == "cpu")


@pytest.mark.parametrize("num_layers", [1, 2])
def test_layers_that_cache_latents(
    num_layers: int, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values are made of what all chunks of a step see, rows that decode attend to
    latents; what is more than there is room for, and of many heads few tokens behind many, are
    launched."""
    fields = {**TINY_MODELS["deepseek_v2"]["as lite"], "v_head_dim": 24}
    fields |= {"vocab_size": CONFIG["vocab_size"], "num_hidden_layers": num_layers}
    make_tiny(tmp_path, "deepseek_v2", fields)
    config = EngineConfig(tmp_path, "cpu", "float32", kernels="torch", num_blocks=40)
    reference = ModelRunner(config)
    monkeypatch.setattr(prompt_steps, "EXPANDED_TOKENS", 3 * STRETCH_TOKENS)
    if num_layers == 1:
        monkeypatch.setattr(prompt_steps, "_FEW_HEADS", 3)
    config = replace(config, device=device.type, kernels="triton", max_num_seqs=4)
    runner = ModelRunner(config)
    if device.type == "cpu":
        captured(runner, StandInGraphs())
    a, c = (Answer(reference, number, length, GREEDY) for number, length in ((0, 45), (2, 19)))
    b, d = (Answer(reference, number, length, SHAPED) for number, length in ((1, 7), (3, 20)))
    for each in (a, b, c, d):
        each.open(runner)
    steps = [
        [(a, a.chunk(0, 16))],
        [(b, b.chunk(0, 7)), (a, a.chunk(16, 33))],
        [(a, a.chunk(33, 45)), (b, b.next(1))],
        [(b, b.next(2)), (c, c.chunk(0, 3)), (a, a.next(1))],
        [(c, c.chunk(3, 17)), (a, a.next(2)), (b, b.next(3)), (d, d.chunk(0, 11))],
    ]
    one_ahead(runner, steps)
    counts = runner.num_prompt_steps
    assert (counts.captured, counts.launched) == (5, 0)
    monkeypatch.setattr(prompt_columns, "_MANY_KEYS", 18)
    last = [(d, d.chunk(11, 20)), (c, c.chunk(17, 19))]
    took(last, runner.launch(Batch([row for _, row in last])))
    num_launched = 1 if num_layers == 1 else 0
    assert (counts.captured, counts.launched) == (6 - num_launched, num_launched)
    monkeypatch.undo()
    many = [BatchRow(tokens(2, number), 0, [[30 + number]]) for number in range(4)]
    runner.forward(Batch(many))
    assert counts.launched == num_launched + 1, "a stretch each"
    took([(a, a.next())], runner.launch(Batch([a.next()])))
    for each in (a, b, c, d):
        assert each.drawn == each.expected[: len(each.drawn)] and each.drawn


def of_slots(runner: ModelRunner) -> list[torch.Tensor]:
    """[slots, heads, layers, …] of each kind of state, without the slot of zeros."""
    return [
        each[:-1]
        for cache in runner.kv_cache.caches
        if not isinstance(cache, torch.Tensor)
        for each in cache.values()
    ]


def keeping(runner: ModelRunner, slot: int) -> list[int]:
    return [NO_BLOCK if group.spec.grows else slot for group in runner.groups]


def fields_of(record: Any) -> dict[str, Any]:
    fields: dict[str, Any] = record.fields
    return fields
