"""Layers that keep a state of constant size, beside full ones: split equals together, whatever
fails.

A state is handed over when its prompt is computed; one that is lost, by preemption or with its
worker, is computed from the prompt's beginning.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Stack
from tests.e2e.oracle import Ask, Oracle
from tests.faults.streams import Background
from tests.recurrent import FULL, RECURRENT, known, make_recurrent

pytestmark = [pytest.mark.e2e, pytest.mark.exact]

WORKERS = {"p0": "prefill", "d0": "decode"}
NUM_SLOTS = 4
FIELDS: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "layer_types": [RECURRENT, RECURRENT, FULL, RECURRENT],
    "state_num_heads": 4,
    "state_head_dim": 20,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("recurrent")
    make_recurrent(directory, FIELDS)
    with known():
        yield directory


@pytest.fixture
def stack(model: Path, tmp_path: Path) -> Iterator[Stack]:
    with Stack(
        model,
        tmp_path,
        WORKERS,
        worker_module="tests.recurrent_worker",
        # The decode worker has blocks enough for about two, and slots for four: whether one yields
        # is left to when they come (tests/unit/worker/test_states.py plans it).
        flags=[
            *("--num-blocks", "48", "--token-budget", "48", "--max-model-len", "640"),
            *("--max-num-seqs", str(NUM_SLOTS)),
        ],
        failpoints={"p0": "corrupt_state,corrupt_checkpoint"},
    ) as stack:
        yield stack


def test_split_equals_together(stack: Stack, model: Path) -> None:
    """A state that is corrupted in the hand-off, one that is corrupted as it is kept, full pools,
    and a decode worker that is killed in mid-stream: new attempts begin with states that were kept.
    """
    source = random.Random(5)
    drawn = {"temperature": 1.0, "seed": 7}
    asks = [
        Ask(
            [source.randrange(3, 512) for _ in range(num_prompt)],
            {"max_tokens": 160, **(drawn if number % 2 else {})},
        )
        for number, num_prompt in enumerate((30, 210, 240, 97, 64))
    ]
    # The second begins with a copy of the state that was kept of the prompt.
    of_samples = [Ask(asks[1].prompt[:50], {"max_tokens": 60, **drawn}, i) for i in range(2)]
    oracle = Oracle(model)
    expected, expected_samples = oracle.answers(asks), oracle.answers(of_samples)
    samples = Background(stack, of_samples[0].prompt, n=2, **of_samples[0].sampling)
    streams = [Background(stack, ask.prompt, ignore_eos=True, **ask.sampling) for ask in asks]
    stack.wait_until(lambda: sum(stream.num_tokens for stream in streams) > 200)
    killed = stack.state("d0")
    stack.kill("d0")
    stack.restart("d0")
    results = [stream.result() for stream in streams]
    assert [result.token_ids for result in results] == expected
    assert [result.token_ids for result in samples.results()] == expected_samples
    assert sum(result.attempts for result in results) > len(results)
    states = [stack.state(name) for name in WORKERS]
    counters = [state.counters for state in (*states, killed)]
    assert sum(each.num_digest_mismatches for each in counters) >= 1
    assert counters[0].num_restored_states >= 1
    # One more at the worker that computes prompts: a quarter as many are kept.
    assert [state.num_free_blocks_by_pool[1] for state in states] == [NUM_SLOTS + 1, NUM_SLOTS]
    stack.assert_idle()
