"""A worker's loop over steps whose state stays on the device: what the loop plans, with tables that
grow and give back, is what the device was told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.sampling import SamplingParams
from tests.kernels.test_engine import SMALL, maker, tokens
from tests.unit.worker.network import Clock
from tests.unit.worker.simulation import Cluster
from tests.unit.worker.test_steps_ahead import Bench

pytestmark = [
    pytest.mark.usefixtures("few_programs"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning"),
]


class _Ahead:
    """A step is launched before the result of the one before is taken, as on a GPU."""

    steps_ahead = 1

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


class _Bench(Bench):
    make_flaky: ClassVar[Any] = _Ahead


@pytest.mark.parametrize("kinds", [("full", "sliding"), ("sliding", "full")])
def test_tables_grow_and_give_back(
    tmp_path: Path, device: torch.device, kinds: tuple[str, str]
) -> None:
    """Prompts longer than a window and what is computed ahead of it, one of which begins as the
    other does; blocks behind the window become another's meanwhile."""
    fields = {
        **SMALL,
        "model_type": "qwen2",
        "num_hidden_layers": 2,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
        "layer_types": [f"{kind}_attention" for kind in kinds],
    }
    make = maker(tmp_path, fields)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    long = tokens(100, 1)
    prompts = [long, [*long[:40], *tokens(30, 2)]]
    expected = PlainLoop(make("torch", torch.device("cpu"))).generate(prompts, [params] * 2)
    bench = _Bench(make("triton", device, num_blocks=16, token_budget=16))
    for number, prompt in enumerate(prompts):
        bench.start(number, tuple(prompt), params)
    bench.run()
    assert [bench.tokens[number] for number in range(2)] == expected


def test_answers_that_give_way_come_again(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pool for half of them, from prefill to decode: what is drawn behind tokens of an earlier
    attempt, penalties and all, is what an undisturbed run draws."""
    clock = Clock()
    for module in ("engine_loop", "handoff"):
        monkeypatch.setattr(f"baton.services.worker.{module}.time", clock)
    make = maker(tmp_path, SMALL)
    ways = [
        SamplingParams(temperature=0.0, repetition_penalty=1.4),
        SamplingParams(temperature=0.9, top_k=20, seed=5, presence_penalty=1.0),
        SamplingParams(temperature=0.8, top_p=0.9, seed=6, frequency_penalty=0.7),
    ]
    params = [replace(each, max_tokens=20, ignore_eos=True) for each in ways]
    prompts = [tuple(tokens(13, seed)) for seed in range(3)]
    expected = PlainLoop(make("torch", torch.device("cpu"))).generate(prompts, params)
    runners: Any = {
        name: _Ahead(make("triton", device, num_blocks=num_blocks, token_budget=8))
        for name, num_blocks in (("prefill", 12), ("decode", 5))
    }
    cluster = Cluster(runners, clock)
    requests = [
        cluster.submit(*each, is_local=number == 2)
        for number, each in enumerate(zip(prompts, params, expected, strict=True))
    ]
    cluster.settle()
    assert [request.token_ids for request in requests] == expected
    assert cluster.network.workers["decode"].counters["preemptions"] > 0
    assert max(request.num_attempts for request in requests) > 1
