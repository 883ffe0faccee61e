"""A worker's loop over steps whose state stays on the device: what the loop plans, with tables that
grow and give back, is what the device was told."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.sampling import SamplingParams
from tests.kernels.test_engine import SMALL, maker, tokens
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
