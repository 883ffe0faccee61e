"""A model all of whose layers keep states has no blocks at all: a long sequence holds one slot."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Stack
from tests.e2e.oracle import Ask, Oracle
from tests.faults.streams import Background
from tests.unit.engine.tiny_models import make_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.exact]

WORKERS = {"p0": "prefill", "d0": "decode"}
NUM_PROMPT = 32_768
NUM_SLOTS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mamba2")
    sizes = {"num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1, "hidden_size": 16}
    make_tiny(directory, "mamba2", {**sizes, "num_hidden_layers": 1})
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    # What no file of this type has.
    del fields["max_position_embeddings"]
    path.write_text(json.dumps(fields))
    return directory


@pytest.fixture
def stack(model: Path, tmp_path: Path) -> Iterator[Stack]:
    flags = ["--max-num-seqs", str(NUM_SLOTS), "--state-checkpoints", "1"]
    with Stack(model, tmp_path, WORKERS, flags=flags) as stack:
        yield stack


def test_a_long_sequence_holds_one_slot(stack: Stack, model: Path) -> None:
    """Admitted, routed, computed, handed over, told of and, when its worker dies, computed anew."""
    prompt = random.Random(1).choices(range(3, 320), k=NUM_PROMPT)
    ask = Ask(prompt, {"max_tokens": 400})
    [expected] = Oracle(model).answers([ask])
    stream = Background(stack, prompt, ignore_eos=True, **ask.sampling)
    stack.wait_until(lambda: stream.num_tokens > 20)
    running = stack.state("d0")
    assert running.num_running == 1 and running.counters.num_pulled_blocks == 1
    assert list(running.num_free_blocks_by_pool) == [running.num_blocks - 1]
    assert min(each.max_model_len for each in stack.status().workers) == 2**20
    stack.kill("d0")
    stack.restart("d0")
    assert stream.result().token_ids == expected
    stack.assert_idle()
