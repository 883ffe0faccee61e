"""The answers that no fault disturbs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.sampling import SamplingParams
from tests.device import ENGINE
from tests.e2e.conftest import tiny_model as tiny_model

Oracle = Callable[..., list[int]]


@pytest.fixture(scope="session")
def oracle(tiny_model: Path) -> Oracle:
    """What `Stack.start` with the same arguments must bring: one sample of one prompt, alone, in
    this process."""
    config = EngineConfig(model_dir=tiny_model, num_blocks=256, **{"dtype": "float32", **ENGINE})
    loop = PlainLoop(ModelRunner(config))

    def answer(prompt: list[int], sample: int = 0, **sampling: object) -> list[int]:
        params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
        [token_ids] = loop.generate([prompt], [params], samples=[sample])
        return token_ids

    return answer


def make_prompt(name: object, num_tokens: int) -> list[int]:
    """Random token ids of the tiny model, the same for the same name."""
    draw = random.Random(str(name))
    return [draw.randrange(3, 512) for _ in range(num_tokens)]
