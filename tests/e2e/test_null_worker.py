"""What `benchmarks.doors` and `make load-test` ask of a gateway works before a worker without an
engine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from baton.loadtest.target import Target
from benchmarks import doors
from benchmarks.stack import set_import_path

pytestmark = pytest.mark.e2e

MODEL = doors.DEMO_MODEL
NUM_STREAMS = 2
NUM_TOKENS = 64


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        # What is set there is gone afterwards.
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        set_import_path()
        with doors.null_stack(MODEL) as (_, addresses):
            yield addresses


@pytest.mark.parametrize("door", ["grpc", "http"])
async def test_streams_get_all_of_their_tokens(addresses: dict[str, str], door: str) -> None:
    target = Target.parse(f"{door}://{addresses[door]}")
    prompts = doors.random_prompts(NUM_STREAMS, 16)
    samples = await doors.ask_all(target, MODEL.name, prompts, NUM_TOKENS)
    assert [(sample.status, sample.num_tokens) for sample in samples] == [("OK", 64)] * NUM_STREAMS
    assert all(0 < sample.num_messages <= NUM_TOKENS for sample in samples)
    assert {sample.num_prompt_tokens for sample in samples} == {16}


async def test_an_answer_that_fails_is_told(addresses: dict[str, str]) -> None:
    target = Target.parse(f"http://{addresses['http']}")
    with pytest.raises(RuntimeError, match="http://"):
        await doors.ask_all(target, "another-model", doors.random_prompts(1, 16), 1)
