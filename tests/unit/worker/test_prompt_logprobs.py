"""An engine tells of a prompt what any other does, in whatever chunks, before the first token."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.services.worker import messages as msg
from baton.services.worker.reports import Reports
from baton.shared.engine.batch import Batch, BatchRow, WantedLogprobs
from baton.shared.kv.drawn import TokenLogprobs
from baton.shared.rpc.convert import logprobs_from_pb
from baton.shared.rpc.errors import EngineFailure
from baton.shared.sampling import SamplingParams
from tests.unit.worker.conftest import MakeRunner
from tests.unit.worker.test_steps_ahead import Bench

PROMPT = tuple(3 + 7 * i % 50 for i in range(39))
PARAMS = SamplingParams(
    temperature=0.0, max_tokens=4, ignore_eos=True, prompt_logprobs=2, logprobs=1
)
NUM_BLOCKS = 24


class TellingBench(Bench):
    num_before = 0
    """Tokens of attempts before, by which each list of tokens begins."""

    def _hear(self, mail: list[msg.Outgoing]) -> None:
        """Before the first token, in order."""
        told = self.__dict__.setdefault("told", {})
        for message in mail:
            if isinstance(message, msg.ToGateway) and message.message.HasField("prompt_logprobs"):
                of_slot = message.message.prompt_logprobs
                known: list[TokenLogprobs] = told.setdefault(of_slot.slot, [])
                assert of_slot.logprobs.first_position == 1 + len(known)
                assert len(self.tokens[of_slot.slot]) == self.num_before
                known += map(logprobs_from_pb, of_slot.logprobs.tokens)
        super()._hear(mail)

    def told_of(self, number: int) -> list[TokenLogprobs]:
        told: dict[int, list[TokenLogprobs]] = self.__dict__.get("told", {})
        return told.get(number, [])


@pytest.fixture
def bench(make_runner: MakeRunner) -> TellingBench:
    return TellingBench(make_runner(NUM_BLOCKS))


def at_once(make_runner: MakeRunner) -> list[TokenLogprobs | None]:
    wanted = WantedLogprobs(0, PROMPT[1:], 2)
    row = BatchRow(PROMPT, 0, [list(range(10))], prompt_logprobs=wanted)
    step = make_runner(NUM_BLOCKS).launch(Batch([row]))
    step.result()
    return list(step.prompt_logprobs(0))


def test_cold_warm_and_beside_others(bench: TellingBench, make_runner: MakeRunner) -> None:
    expected = at_once(make_runner)
    for number in range(2):
        bench.start(number, PROMPT, PARAMS)
        bench.run()
    # All of it is in the cache; who does not ask finds it there.
    plain = bench.start(2, PROMPT, replace(PARAMS, prompt_logprobs=None))
    bench.start(3, PROMPT, PARAMS)
    bench.start(4, PROMPT[:20], replace(PARAMS, prompt_logprobs=20))
    bench.run()
    assert plain.num_cached_tokens == 36 and bench.told_of(2) == []
    for number in (0, 1, 3):
        assert bench.told_of(number) == expected
        assert bench.tokens[number] == bench.tokens[2]
    assert [each.logprob for each in bench.told_of(4)] == [
        each.logprob for each in expected[:19] if each is not None
    ]


def test_of_what_was_emitted_before_nothing_is_told(
    bench: TellingBench, make_runner: MakeRunner
) -> None:
    """It was told when it was drawn."""
    bench.num_before = 5
    bench.tokens[0] = [*PROMPT[-5:]]
    sequence = bench.start(0, PROMPT, replace(PARAMS, max_tokens=9))
    sequence.first_index = 5
    bench.run()
    assert bench.told_of(0) == at_once(make_runner)[: len(PROMPT) - 5 - 1]


def test_in_messages_of_a_size(
    bench: TellingBench, make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.services.worker.reports._MOST_IN_A_MESSAGE", 5)
    bench.start(0, PROMPT, PARAMS)
    bench.run()
    assert bench.told_of(0) == at_once(make_runner)


def test_what_is_not_told_is_not_kept(bench: TellingBench) -> None:
    reports: Reports = bench.engine._reports
    sequence = bench.start(0, PROMPT, PARAMS)
    while not reports._prompt_logprobs:
        bench.step()
    bench.engine._handle(msg.CancelAttempts(sequence.key))
    bench.run()
    assert not reports._prompt_logprobs and bench.told_of(0) == []


def test_logits_that_are_not_numbers_in_the_middle_of_a_prompt(bench: TellingBench) -> None:
    spoiled = bench.start(0, PROMPT, PARAMS)
    while not spoiled.num_computed_tokens:
        bench.step()
    bench.runner.kv_cache.tensors[0][spoiled.block_tables[0]] = float("nan")
    bench.run()
    error = bench.failures.pop(0)
    assert isinstance(error, EngineFailure) and "not numbers" in error.message
    assert bench.told_of(0) == [] and not bench.tokens[0]
