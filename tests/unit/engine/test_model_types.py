"""Every model type against transformers, and against itself: float32 logits, greedy tokens, and the
class `exact`, over random tiny models (tiny_models.py).

transformers is asked once for each answer: where its choice behind every prefix of ours is the
token that we have next, its own answer is ours.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.sampling import SamplingParams
from tests.device import ENGINE, ON_GPU
from tests.unit.engine.tiny_deltas import TINY_DELTAS
from tests.unit.engine.tiny_latents import TINY_LATENTS
from tests.unit.engine.tiny_mambas import TINY_MAMBAS
from tests.unit.engine.tiny_models import ALL_TINY, CASES, WINDOW, make_tiny
from tests.unit.worker.network import Clock
from tests.unit.worker.simulation import Cluster

CHUNK = 48
# Around a block, a window, a chunk; and one of several chunks.
LENGTHS = (1, 15, 16, 17, WINDOW - 1, WINDOW, WINDOW + 1, CHUNK - 1, CHUNK, CHUNK + 1, 150)
ENDS = (17, 48, 63, 64, 65, 128, 129, 150)
"""Of the chunks of a prompt."""
_SAME_TEXT = ("mistral3", "qwen2_5_vl", "qwen3_vl", "gemma3", "gemma4")
"""Types whose text model is another type's, so that only what is read differs."""
_CACHE_FIELDS = (
    *("layer_types", "num_kv_shared_layers", "attention_k_eq_v"),
    *("sliding_window", "sliding_window_pattern", "use_sliding_window", "max_window_layers"),
)
"""Of layers that attend to keys and values, what decides how many caches there are, and which."""
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
"""Two blocks, and more than a window."""
SPLIT = (3, 9)
"""Of the prompts, those that a prefill worker hands off."""
_LONGEST = 6
"""Blocks of the longest prompt with its answer; what two take is more than one above."""
_WINDOWS = 4
"""Blocks that two sequences have of a window, at most."""
MakeRunner = Callable[[int], ModelRunner]


def with_caches_of_their_own() -> list[tuple[str, str]]:
    """Of a type the first case with the same keys and values; all cases of what caches others."""
    first: dict[tuple[str, str], tuple[str, str]] = {}
    for model_type, case in CASES:
        fields = ALL_TINY[model_type][case]
        has_others = model_type in {**TINY_LATENTS, **TINY_DELTAS, **TINY_MAMBAS}
        caches = case if has_others else repr([fields.get(field) for field in _CACHE_FIELDS])
        if model_type not in _SAME_TEXT:
            first.setdefault((model_type, caches), (model_type, case))
    return list(first.values())


@dataclass(frozen=True)
class Tiny:
    """A tiny model in transformers and here, and what it answers here."""

    model: Any
    runner: ModelRunner
    make_runner: MakeRunner
    """Given the blocks of its pool."""
    prompts: list[list[int]]
    answers: list[list[int]]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    model_type, case = request.param
    model_dir = tmp_path_factory.mktemp("tiny")

    def make_runner(num_blocks: int) -> ModelRunner:
        config = EngineConfig(
            model_dir, num_blocks=num_blocks, max_num_seqs=8, state_checkpoints=8, **ENGINE
        )
        return ModelRunner(config)

    model = make_tiny(model_dir, model_type, ALL_TINY[model_type][case])
    # transformers knows no cache for a model all of whose layers keep states.
    model.config.use_cache = False
    runner = make_runner(192)
    prompts = [random_tokens(length, length, runner) for length in LENGTHS]
    answers = PlainLoop(runner).generate(prompts, [GREEDY] * len(prompts), chunk=CHUNK)
    return Tiny(model, runner, make_runner, prompts, answers)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_tokens(length: int, seed: int, runner: ModelRunner) -> list[int]:
    return random.Random(seed).choices(range(runner.model_config.vocab_size), k=length)


def tables(runner: ModelRunner, first: int = 0, num_blocks: int = 12) -> list[list[int]]:
    """By cache group, blocks that no other group has; a slot of groups of states."""
    starts = [first + index * num_blocks for index in range(len(runner.groups))]
    return [
        list(range(start, start + num_blocks)) if group.spec.grows else [first // 32]
        for start, group in zip(starts, runner.groups, strict=True)
    ]


@pytest.mark.exact
def test_logits_and_greedy_tokens_are_those_of_transformers(tiny: Tiny) -> None:
    whole = [prompt + answer for prompt, answer in zip(tiny.prompts, tiny.answers, strict=True)]
    longest = max(len(each) for each in whole)
    # What stands behind a sequence does not reach back.
    padded = [each + [0] * (longest - len(each)) for each in whole]
    with torch.no_grad():
        expected: Tensor = tiny.model(torch.tensor(padded), use_cache=False).logits
    for prompt, answer, logits in zip(tiny.prompts, tiny.answers, expected, strict=True):
        behind = logits[len(prompt) - 1 :][: len(answer)]
        assert behind.argmax(-1).tolist() == answer
        [got] = tiny.runner.logits(Batch([BatchRow(prompt, 0, tables(tiny.runner))])).cpu()
        assert behind[0].max() - behind[0].min() > 10
        limit = 1e-3 * float(behind[0].abs().max()) if ON_GPU else 1e-4
        torch.testing.assert_close(got, behind[0], atol=limit, rtol=0)


@pytest.mark.exact
@pytest.mark.parametrize("tiny", with_caches_of_their_own(), ids="-".join, indirect=True)
def test_bits_depend_neither_on_chunks_nor_on_what_shares_a_step(tiny: Tiny) -> None:
    runner = tiny.runner
    assert runner.determinism == "exact"
    tokens = random_tokens(150, 1, runner)
    row = tables(runner)
    whole = {end: runner.logits(Batch([BatchRow(tokens[:end], 0, row)]))[0].clone() for end in ENDS}
    other = random_tokens(33, 2, runner)
    position = 0
    for end in ENDS:
        beside = [
            BatchRow(other, 0, tables(runner, 64)),
            BatchRow(other[:1], 0, tables(runner, 96)),
        ]
        part = BatchRow(tokens[position:end], position, row)
        logits = runner.logits(Batch([beside[0], part, beside[1]]))[1]
        assert torch.equal(logits, whole[end]), f"differs at position {end}"
        position = end


@pytest.mark.exact
@pytest.mark.parametrize("tiny", with_caches_of_their_own(), ids="-".join, indirect=True)
def test_split_with_a_worker_that_dies_and_has_few_blocks(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network checks every token of every attempt; the second ones find their prefixes."""
    clock = Clock()
    for module in ("engine_loop", "handoff"):
        monkeypatch.setattr(f"baton.services.worker.{module}.time", clock)
    groups = tiny.runner.groups
    decode = tiny.make_runner(_LONGEST + 1 + _WINDOWS * (len(groups) - 1))
    cluster = Cluster({"prefill": tiny.runner, "decode": decode}, clock)
    requests = [
        cluster.submit(tuple(tiny.prompts[index]), GREEDY, tiny.answers[index]) for index in SPLIT
    ]
    cluster.settle(until=lambda: len(requests[-1].token_ids) > 10)
    cluster.network.kill("decode")
    cluster.settle()
    workers = cluster.network.workers
    assert [each.token_ids for each in requests] == [tiny.answers[index] for index in SPLIT]
    assert sum(each.num_attempts for each in requests) > len(requests)
    assert workers["prefill"].counters["cached_prompt_tokens"] > 0
    if len(groups) == 1 and groups[0].spec.reads_everything:
        assert workers["decode"].counters["preemptions"] == 1
