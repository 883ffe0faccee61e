"""A model that runs through transformers, with windows in some layers: split equals together when
a decode worker dies, and status says whose code it is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from baton.services.launcher.status import to_json, to_text
from tests.e2e.harness import Stack
from tests.e2e.oracle import Ask, Oracle
from tests.faults.streams import Background
from tests.unit.engine.tiny_models import make_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.exact]

WORKERS = {"p0": "prefill", "d0": "decode", "d1": "decode"}
FIELDS: dict[str, Any] = {
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "sliding_window": 40,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "olmo3"
    make_tiny(directory, "olmo3", FIELDS)
    return directory


@pytest.fixture
def stack(model: Path, tmp_path: Path) -> Iterator[Stack]:
    flags = ["--num-blocks", "96", "--token-budget", "48", "--max-model-len", "320"]
    with Stack(model, tmp_path, WORKERS, flags=flags) as stack:
        yield stack


def test_split_equals_together(stack: Stack, model: Path) -> None:
    source = random.Random(5)
    drawn = {"temperature": 1.0, "seed": 7}
    asks = [
        Ask(
            [source.randrange(3, 512) for _ in range(num_prompt)],
            {"max_tokens": 100, **(drawn if number % 2 else {})},
        )
        for number, num_prompt in enumerate((30, 150, 97))
    ]
    expected = Oracle(model).answers(asks)
    state = to_json(stack.status())
    name = f"transformers {transformers.__version__}"
    assert {worker["model_impl"] for worker in state["workers"]} == {name}
    assert f"p0 runs the model through {name}: slower than Baton's own" in to_text(state)
    streams = [Background(stack, ask.prompt, ignore_eos=True, **ask.sampling) for ask in asks]
    stack.wait_until(lambda: sum(stream.num_tokens for stream in streams) > 60)
    stack.kill(max(("d0", "d1"), key=lambda name: stack.state(name).num_running))
    results = [stream.result() for stream in streams]
    assert [result.token_ids for result in results] == expected
    assert sum(result.attempts for result in results) > len(results)
