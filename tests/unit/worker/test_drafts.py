"""Decode steps that check guesses of the next tokens: fewer steps, the same answer."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest

from baton.services.worker import messages as msg
from baton.services.worker.sequence_table import Recipient
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.sampling import SamplingParams
from tests.unit.worker.conftest import MakeRunner
from tests.unit.worker.drafting import AllOfThem, DraftingRunner, Planned
from tests.unit.worker.late_runner import LateRunner
from tests.unit.worker.sim_worker import SimWorker

PROMPT = (5, 9, 13, 7, 40)
GREEDY = SamplingParams(temperature=0.0, max_tokens=13, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, seed=3, max_tokens=13, ignore_eos=True)


def guessing(runner: Any, answer: list[int], wrong: set[int], **more: Any) -> DraftingRunner:
    """Guesses are right but for the tokens at the indices in `wrong`. `more`: of the runner."""

    def guess(sequence: Sequence, most: int) -> list[int]:
        first = sequence.next_index
        coming = enumerate(answer[first : first + most], first)
        return [(token + 1) % 61 if index in wrong else token for index, token in coming]

    return DraftingRunner(runner, Planned(guess), **more)


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


class Noting(AllOfThem):
    """Sums up what is told of guesses."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.stood = self.fell = 0

    def checked(self, sequence: Hashable, num_checked: int, num_stood: int) -> None:
        assert 0 <= num_stood <= num_checked
        self.stood += num_stood
        self.fell += num_stood < num_checked


@pytest.mark.parametrize("is_ahead", [False, True], ids=["known", "ahead"])
@pytest.mark.parametrize("is_wrong", [False, True], ids=["right", "wrong"])
def test_what_becomes_of_guesses_is_told(
    make_runner: MakeRunner, is_ahead: bool, is_wrong: bool
) -> None:
    """Those of what a step in flight draws count, too: where they are wrong, the guesses behind
    them tell nothing, and nobody would hear that the text drafts badly."""
    [expected] = PlainLoop(make_runner(24)).generate([PROMPT], [GREEDY])
    lengths, runner = Noting(3), make_runner(24)
    worker = OneWorker(
        guessing(
            LateRunner(runner) if is_ahead else runner,
            expected,
            {*range(len(expected))} if is_wrong else set(),
            lengths=lengths,
        )
    )
    assert worker.answer(GREEDY) == expected
    if is_wrong:
        assert lengths.stood == 0 and lengths.fell > len(expected) // 2
    else:
        assert lengths.fell == 0 and lengths.stood > len(expected) // 2
