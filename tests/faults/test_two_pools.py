"""Two cache groups with blocks of unequal bytes, in pools of their own, one of them with a window:
split equals together, whatever fails. The upper layers read what lower ones store, in 8 bits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Stack
from tests.e2e.oracle import Ask, Oracle
from tests.faults.streams import Background
from tests.unit.engine.tiny_models import make_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.exact]

WORKERS = {"p0": "prefill", "d0": "decode", "d1": "decode"}
WINDOW = 40
FULL, SLIDING = "full_attention", "sliding_attention"
FIELDS: dict[str, Any] = {
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "num_hidden_layers": 5,
    "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL],
    "sliding_window": WINDOW,
    "num_key_value_heads": 1,
    "head_dim": 20,
    "global_head_dim": 24,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 512,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "gemma4"
    make_tiny(directory, "gemma4_text", FIELDS)
    return directory


@pytest.fixture
def stack(model: Path, tmp_path: Path) -> Iterator[Stack]:
    with Stack(
        model,
        tmp_path,
        WORKERS,
        # Some sequences have to yield: in the end about three fit into a decode worker.
        flags=[
            *("--num-blocks", "64", "--token-budget", "48", "--max-model-len", "640"),
            *("--kv-cache-dtype", "fp8"),
        ],
        failpoints={"p0": "corrupt_sealed_block"},
    ) as stack:
        yield stack


def test_split_equals_together(stack: Stack, model: Path) -> None:
    """A corrupted hand-off, a full pool, and a decode worker that is killed in mid-stream."""
    source = random.Random(5)
    drawn = {"temperature": 1.0, "seed": 7}
    asks = [
        Ask(
            [source.randrange(3, 512) for _ in range(num_prompt)],
            {"max_tokens": 5 * WINDOW, **(drawn if number % 2 else {})},
        )
        for number, num_prompt in enumerate((30, 210, 6 * WINDOW, 97, 200, 64))
    ]
    expected = Oracle(model, kv_cache_dtype="fp8").answers(asks)
    streams = [Background(stack, ask.prompt, ignore_eos=True, **ask.sampling) for ask in asks]
    stack.wait_until(lambda: sum(stream.num_tokens for stream in streams) > 300)
    busiest = max(("d0", "d1"), key=lambda name: stack.state(name).num_running)
    stack.kill(busiest)
    stack.restart(busiest)
    results = [stream.result() for stream in streams]
    assert [result.token_ids for result in results] == expected
    assert sum(result.attempts for result in results) > len(results)
    counters = [stack.state(name).counters for name in WORKERS]
    assert sum(each.num_digest_mismatches for each in counters) >= 1
    assert len(stack.state("p0").num_free_blocks_by_pool) == 2
    stack.assert_idle()
