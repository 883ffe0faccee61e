"""What may not be drawn, in the engine: known before a step is launched, whoever guesses, and
whatever came before; and what becomes of a sequence that has nothing left to draw."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq
from typing import Any

import pytest

from baton.shared.engine.batch import Batch
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.kv.sequence import AttemptKey, FinishReason, Sequence
from baton.shared.rpc.errors import InvalidField
from baton.shared.sampling import SamplingParams
from tests.unit.worker.conftest import MakeRunner
from tests.unit.worker.drafting import DraftingRunner, Planned
from tests.unit.worker.late_runner import LateRunner, LateStep
from tests.unit.worker.test_speculation import OneWorker
from tests.unit.worker.test_steps_ahead import NUM_BLOCKS, Bench, undisturbed

PROMPT = (5, 9, 13, 7, 40, 5, 9, 13, 7, 40, 5, 9)
LENGTH = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)


class WatchedRunner(LateRunner):
    """Every step is launched with tokens that are known."""

    def launch(self, batch: Batch) -> LateStep:
        assert all(row.token_ids is not None for row in batch.rows)
        return super().launch(batch)


def runs(sequence: Seq[int], of: Seq[int]) -> bool:
    """Whether one is in the other."""
    return any(tuple(of[at : at + len(sequence)]) == sequence for at in range(len(of)))


@pytest.mark.parametrize("guesses", [False, True])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_bad_words_do_not_come(make_runner: MakeRunner, guesses: bool, runs_ahead: bool) -> None:
    [plain] = PlainLoop(make_runner(24)).generate([PROMPT], [GREEDY])
    banned = (tuple(plain[1:3]), (plain[4],), tuple(plain[5:8]))
    assert all(runs(each, plain) for each in banned)
    oracle = PlainLoop(make_runner(24))
    [expected] = oracle.generate([PROMPT], [GREEDY], banned_sequences=banned)
    first = Sequence(AttemptKey("r", 0, 1), PROMPT, GREEDY, banned_sequences=banned)
    assert OneWorker(make_runner(24)).answer(first) == expected
    assert len(expected) == LENGTH and not any(runs(each, expected) for each in banned)

    def guess(sequence: Sequence, most: int) -> list[int]:
        """What the answer would be without: right, until it would not be."""
        return [*expected[sequence.next_index :], *plain][:most]

    runner: Any = make_runner(24)
    if runs_ahead:
        runner = WatchedRunner(runner)
    if guesses:
        runner = DraftingRunner(runner, Planned(guess))
    worker = OneWorker(runner)
    second = Sequence(AttemptKey("s", 0, 1), PROMPT, GREEDY, banned_sequences=banned)
    assert worker.answer(second) == expected
    assert (worker.counters["accepted_tokens"] > 0) is guesses
    # Another attempt, in the middle of what would be a bad word.
    for num_emitted in (1, 2, 6):
        worker.token_ids.clear()
        third = Sequence(
            AttemptKey(f"t{num_emitted}", 0, 2),
            (*PROMPT, *expected[:num_emitted]),
            GREEDY,
            first_index=num_emitted,
            banned_sequences=banned,
        )
        assert worker.answer(third) == expected[num_emitted:]


def test_the_end_waits_for_its_least_tokens(make_runner: MakeRunner) -> None:
    """Over attempts: a stop token that would have come sooner comes when it may."""
    [plain] = PlainLoop(make_runner(24)).generate([PROMPT], [GREEDY])
    ends = frozenset({plain[2], plain[7]})
    params = dataclasses.replace(GREEDY, stop_token_ids=ends, min_tokens=6)
    [expected] = PlainLoop(make_runner(24)).generate([PROMPT], [params])
    assert not ends & set(expected[:6])
    for num_emitted in (0, 4):
        sequence = Sequence(
            AttemptKey("r", 0, 1), (*PROMPT, *expected[:num_emitted]), params, num_emitted
        )
        assert OneWorker(make_runner(24)).answer(sequence) == expected[num_emitted:]
    assert sequence.finish_reason is (
        FinishReason.STOP if expected[-1] in ends else FinishReason.LENGTH
    )


def test_who_has_nothing_left_to_draw_is_told_so(make_runner: MakeRunner) -> None:
    """The request is at fault: no other attempt would help, and its blocks are sound."""
    bench = Bench(make_runner(NUM_BLOCKS))
    params = dataclasses.replace(GREEDY, allowed_token_ids=frozenset({8}))
    bench.start(0, PROMPT, params, banned_sequences=((8, 8, 8),))
    bench.start(1, PROMPT[:5], GREEDY)
    bench.run()
    error = bench.failures.pop(0)
    assert isinstance(error, InvalidField) and error.field == "sampling"
    assert "leaves no token to draw behind 2 tokens of the answer" in error.message
    assert bench.tokens[0] == [8, 8] and not bench.failures
    assert bench.tokens[1] == undisturbed(make_runner, PROMPT[:5], GREEDY)
