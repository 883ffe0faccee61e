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
        on_mask: Callable[[], None] = lambda: None,
    ) -> None:
        """Masks fail behind `fails_at` tokens, and when `fails_when` says so; `on_mask` is told
        before one is made."""
        self.num_taken = 0
        self._vocab_size = vocab_size
        self._emitted: list[int] = []
        self._fails_at = fails_at
        self._error = error
        self._fails_when = fails_when
        self._on_mask = on_mask

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
        self._on_mask()
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


def start_three(bench: Bench) -> dict[int, OnlyOne]:
    """Two that are constrained, of nine tokens, beside one of twelve that is not."""
    log = bench.runner.log
    matchers = {
        number: constrain(
            bench,
            bench.start(number, PROMPTS[number], sampling(number, 9)),
            on_mask=lambda: log.append("mask"),
        )
        for number in (0, 2)
    }
    bench.start(1, PROMPTS[1], sampling(1, 12))
    return matchers


def make_slow(bench: Bench, matchers: dict[int, OnlyOne], monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask takes all that grammars may take of a step."""
    now_s = [0.0]

    def take_long() -> None:
        now_s[0] += 0.06

    monkeypatch.setattr(bench.engine._stepper._constraining, "_clock", lambda: now_s[0])
    for matcher in matchers.values():
        matcher._on_mask = take_long


def check_three(bench: Bench, matchers: dict[int, OnlyOne], make_runner: MakeRunner) -> None:
    assert not bench.failures
    for number, matcher in matchers.items():
        assert bench.tokens[number] == matcher.answer(9)
        assert bench.reasons[number] is FinishReason.LENGTH
    assert bench.tokens[1] == undisturbed(make_runner, PROMPTS[1], sampling(1, 12))


def test_masks_are_made_by_all_tokens_before_them_while_their_step_computes(
    bench: Bench, make_runner: MakeRunner
) -> None:
    """A step begins before the result of the last is taken, whoever is in it; the masks follow,
    then it draws: each step brings everyone a token."""
    matchers = start_three(bench)
    bench.run()
    check_three(bench, matchers, make_runner)
    prompts = ["mask", "mask", "launch"]
    together = ["begin", "result", "mask", "mask", "draw"] * 8
    alone = ["launch", "result"] * 3
    assert bench.runner.log == [*prompts, *together, *alone, "result"]


def test_what_there_is_no_time_to_mask_is_drawn_again(
    bench: Bench, make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take turns, and others wait for none of them."""
    matchers = start_three(bench)
    make_slow(bench, matchers, monkeypatch)
    bench.run()
    check_three(bench, matchers, make_runner)
    ends = [bench.runner.ends[number] for number in range(3)]
    assert ends[1] == list(range(len(PROMPTS[1]), len(PROMPTS[1]) + 12))
    for number in (0, 2):
        length = len(PROMPTS[number])
        assert sorted(set(ends[number])) == list(range(length, length + 9))
        assert len(ends[number]) > 9, "some were computed twice"


@pytest.mark.parametrize("is_slow", [False, True])
@pytest.mark.parametrize("is_begun", [False, True])
def test_a_step_that_fails_before_its_masks_or_behind_them_is_tried_row_by_row(
    bench: Bench,
    make_runner: MakeRunner,
    monkeypatch: pytest.MonkeyPatch,
    is_begun: bool,
    is_slow: bool,
) -> None:
    """But for rows whose masks there was no time for."""
    matchers = start_three(bench)
    for _ in range(4):
        bench.step()
    if is_slow:
        make_slow(bench, matchers, monkeypatch)
    if is_begun:
        bench.runner.fails_to_draw = True
    else:
        bench.runner.fails_to_begin = True
    bench.step()
    bench.runner.fails_to_draw = bench.runner.fails_to_begin = False
    assert bench.runner.log.count("alone") == 3 - is_slow
    bench.runner._num_alone = 0
    bench.run()
    check_three(bench, matchers, make_runner)


def test_no_mask_is_made_for_what_ended_while_its_step_computed(bench: Bench) -> None:
    log = bench.runner.log
    stop = OnlyOne(bench.runner.model_config.vocab_size).answer(4)[-1]
    started = bench.start(0, PROMPTS[0], sampling(3, 9, frozenset({stop})))
    matcher = constrain(bench, started, on_mask=lambda: log.append("mask"))
    bench.run()
    assert bench.tokens[0] == matcher.answer(4)
    assert bench.reasons[0] is FinishReason.STOP
    assert log.count("mask") == 4 and log[-4:] == ["begin", "result", "draw", "result"]


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
