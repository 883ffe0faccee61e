"""Decode steps that check guesses of the next tokens: fewer steps, the same answer."""

from __future__ import annotations

from typing import Any

import pytest

from baton.services.worker import messages as msg
from baton.services.worker.sequence_table import Recipient
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.sampling import SamplingParams
from tests.unit.worker.conftest import MakeRunner
from tests.unit.worker.drafting import DraftingRunner, Planned
from tests.unit.worker.sim_worker import SimWorker

PROMPT = (5, 9, 13, 7, 40)
GREEDY = SamplingParams(temperature=0.0, max_tokens=13, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, seed=3, max_tokens=13, ignore_eos=True)


def guessing(runner: Any, answer: list[int], wrong: set[int]) -> DraftingRunner:
    """Guesses are right but for the tokens at the indices in `wrong`."""

    def guess(sequence: Sequence, most: int) -> list[int]:
        first = sequence.next_index
        coming = enumerate(answer[first : first + most], first)
        return [(token + 1) % 61 if index in wrong else token for index, token in coming]

    return DraftingRunner(runner, Planned(guess))


class OneWorker(SimWorker):
    def __init__(self, runner: Any) -> None:
        super().__init__("w", "ab" * 16, runner, lambda _, mail: self._hear(mail))
        self.indices: list[int] = []
        self.token_ids: list[int] = []

    def answer(self, params: SamplingParams) -> list[int]:
        sequence = Sequence(AttemptKey("r", 0, 1), PROMPT, params)
        recipient = Recipient(self.gateway_stream, 1)
        self.inbox.put(msg.StartDecode(sequence, recipient, None))
        for _ in range(100):
            self.engine.run_once(may_wait=False)
            self.check()
        assert self.leftovers == {} and self.indices == list(range(len(self.indices)))
        return self.token_ids

    def _hear(self, mail: list[msg.Outgoing]) -> None:
        for message in mail:
            if isinstance(message, msg.ToGateway):
                self.indices.extend(message.message.step.indices)
                self.token_ids.extend(message.message.step.token_ids)


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    ("wrong", "num_steps"),
    [
        # The prompt, then four tokens a step.
        (set(), 4),
        (set(range(13)), 13),
        # Behind a wrong guess nothing counts: the step of token 1 gives that one and token 2.
        ({2, 7}, 6),
    ],
)
def test_the_answer_is_that_without_drafts(
    make_runner: MakeRunner, params: SamplingParams, wrong: set[int], num_steps: int
) -> None:
    [expected] = PlainLoop(make_runner(24)).generate([PROMPT], [params])
    worker = OneWorker(guessing(make_runner(24), expected, wrong))
    assert worker.answer(params) == expected
    assert worker.counters["steps"] == num_steps
    assert worker.counters["generated_tokens"] == len(expected)


def test_an_answer_that_stops_within_the_drafts(make_runner: MakeRunner) -> None:
    """What was computed behind its end reaches nobody."""
    [expected] = PlainLoop(make_runner(24)).generate([PROMPT], [GREEDY])
    stop = next(token for index, token in enumerate(expected) if index > 5)
    end = expected.index(stop) + 1
    params = SamplingParams(
        temperature=0.0, max_tokens=13, ignore_eos=True, stop_token_ids=frozenset([stop])
    )
    worker = OneWorker(guessing(make_runner(24), expected, set()))
    assert worker.answer(params) == expected[:end]
    assert worker.counters["generated_tokens"] == end
