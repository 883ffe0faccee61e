"""Constrained sequences in the engine loop, whose steps are launched ahead where they may be."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import pytest

from baton.shared.kv.sequence import FinishReason
from baton.shared.rpc.errors import InvalidField
from baton.shared.token_masks import TokenMasks
from tests.unit.worker.conftest import MakeRunner
from tests.unit.worker.test_steps_ahead import (
    BAD_SEED,
    NUM_BLOCKS,
    PROMPTS,
    Bench,
    sampling,
    undisturbed,
)


class Panic(BaseException):
    """As llguidance's, which are no Exceptions."""


_PANIC = Panic()


class OnlyOne:
    """Each token is the one that all before it, the drafts included, lead to."""

    def __init__(
        self,
        vocab_size: int,
        *,
        fails_at: int = 1 << 30,
        error: BaseException = _PANIC,
        fails_when: Callable[[], bool] = lambda: False,
    ) -> None:
        """Masks fail behind `fails_at` tokens, and when `fails_when` says so."""
        self.num_taken = 0
        self._vocab_size = vocab_size
        self._emitted: list[int] = []
        self._fails_at = fails_at
        self._error = error
        self._fails_when = fails_when

    def answer(self, num_tokens: int) -> list[int]:
        tokens: list[int] = []
        for _ in range(num_tokens):
            tokens.append(self._next(tokens))
        return tokens

    def take(self, token_ids: Seq[int]) -> None:
        self._emitted += token_ids
        self.num_taken += len(token_ids)

    def forced(self, most: int) -> tuple[int, ...]:
        return ()

    def num_allowed(self, token_ids: Seq[int]) -> int:
        return 0

    def masks(self, draft_ids: Seq[int] = ()) -> TokenMasks:
        if len(self._emitted) >= self._fails_at or self._fails_when():
            raise self._error
        masks = np.zeros((1 + len(draft_ids), -(-self._vocab_size // 32)), np.uint32)
        for index, mask in enumerate(masks):
            token = self._next([*self._emitted, *draft_ids[:index]])
            mask[token // 32] = np.uint32(1 << token % 32)
        return masks

    def _next(self, tokens: Seq[int]) -> int:
        return (7 * sum(tokens) + 3 * len(tokens) + 5) % self._vocab_size


@pytest.fixture
def bench(make_runner: MakeRunner) -> Bench:
    return Bench(make_runner(NUM_BLOCKS))


def constrain(bench: Bench, sequence: Any, **options: Any) -> OnlyOne:
    matcher = OnlyOne(bench.runner.model_config.vocab_size, **options)
    sequence.matcher = matcher
    return matcher


def test_each_mask_has_all_tokens_before_it_and_others_go_on_ahead(
    bench: Bench, make_runner: MakeRunner
) -> None:
    """What is not constrained has a step in flight while the next is launched, as ever."""
    free = sampling(1, 12)
    matchers = {
        number: constrain(bench, bench.start(number, PROMPTS[number], sampling(number, 9)))
        for number in (0, 2)
    }
    bench.start(1, PROMPTS[1], free)
    most = {0: 0, 1: 0, 2: 0}
    while bench.engine.num_sequences or not most[1]:
        bench.step()
        for sequence in bench.engine._table.all():
            number = int(sequence.key.request_id[1:])
            most[number] = max(most[number], sequence.num_steps_in_flight)
    bench.run()
    assert not bench.failures
    for number, matcher in matchers.items():
        assert bench.tokens[number] == matcher.answer(9)
        assert bench.reasons[number] is FinishReason.LENGTH
    assert bench.tokens[1] == undisturbed(make_runner, PROMPTS[1], free)
    launched_twice = "launch,launch" in ",".join(bench.runner.log)
    assert most == {0: 1, 1: 1, 2: 1} and launched_twice


@pytest.mark.parametrize(
    ("fails_at", "error"),
    [(0, _PANIC), (1, InvalidField("constraint", "is too much", limit="less")), (5, _PANIC)],
)
def test_a_mask_that_cannot_be_made_fails_its_sequence_alone(
    bench: Bench, make_runner: MakeRunner, fails_at: int, error: BaseException
) -> None:
    started = bench.start(0, PROMPTS[0], sampling(3, 9))
    matcher = constrain(bench, started, fails_at=fails_at, error=error)
    free = sampling(1, 12)
    bench.start(1, PROMPTS[1], free)
    bench.run()
    assert isinstance(bench.failures.pop(0), InvalidField) and not bench.failures
    assert bench.tokens[0] == matcher.answer(fails_at)
    assert bench.tokens[1] == undisturbed(make_runner, PROMPTS[1], free)
    assert "alone" not in bench.runner.log, "the step itself did not fail"


def test_nothing_is_drawn_without_a_mask_when_rows_are_tried_one_by_one(bench: Bench) -> None:
    """The step is refused for another row: alone, it has the mask that was made for the step."""
    started = bench.start(0, PROMPTS[0], sampling(3, 9))
    matcher = constrain(bench, started, fails_when=lambda: "refused" in bench.runner.log)
    bench.start(1, PROMPTS[1], sampling(BAD_SEED, 12))
    bench.runner.bad_from = len(PROMPTS[1]) + 3
    bench.run()
    assert isinstance(bench.failures.pop(0), InvalidField)
    assert bench.tokens[0] == matcher.answer(len(bench.tokens[0]))
    assert bench.tokens[0] and "alone" in bench.runner.log
