"""What grammars take of a step, whose turn it is, and guesses that lead where none can follow."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from baton.services.worker.constraining import Constraining
from baton.services.worker.part import Part
from baton.shared.constraints.compiler import compile_constraint
from baton.shared.constraints.matcher import AnswerMatcher
from baton.shared.constraints.tokens import TokenTable
from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.rpc.errors import EngineFailure, InvalidField
from baton.shared.sampling import SamplingParams
from baton.shared.token_masks import TokenMasks
from baton.v1 import types_pb2

DEMO = Path(__file__).parents[3] / "models" / "demo"
PROMPT = (7, 8, 9)
MANY = " | ".join("s " * n for n in range(2, 9))


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Slow:
    """Takes `take_s` for each token, `mask_s` for each mask."""

    def __init__(self, clock: Clock, *, mask_s: float, take_s: float = 0.0) -> None:
        self.num_taken = 0
        self._clock, self._mask_s, self._take_s = clock, mask_s, take_s

    def take(self, token_ids: Seq[int]) -> None:
        self._clock.now_s += self._take_s * len(token_ids)
        self.num_taken += len(token_ids)

    def forced(self, most: int) -> tuple[int, ...]:
        return ()

    def masks(self, draft_ids: Seq[int] = ()) -> TokenMasks:
        self._clock.now_s += self._mask_s * (1 + len(draft_ids))
        return np.ones((1 + len(draft_ids), 1), np.uint32)


def sequence_of(number: int, emitted: Seq[int], matcher: Any) -> Sequence:
    sequence = Sequence(
        AttemptKey(f"r{number}", 0, 1), PROMPT, SamplingParams(max_tokens=900), matcher=matcher
    )
    sequence.output_token_ids += emitted
    return sequence


def part_of(sequence: Sequence, drafts: Seq[int] = ()) -> Part:
    return Part(sequence, sequence.num_tokens - 1, 1 + len(drafts), tuple(drafts))


def step(constraining: Constraining, sequences: Seq[Sequence]) -> list[str]:
    """Who takes part in it."""
    parts = [part_of(sequence) for sequence in sequences]
    constraining.add_forced(parts, lambda *_: True, 99)
    taking = constraining.add_masks(parts)
    assert all(part.masks is not None for part in taking if part.sequence.matcher is not None)
    return [part.sequence.key.request_id for part in taking]


def test_a_step_is_not_kept_waiting_by_many_grammars_and_each_gets_its_turn() -> None:
    clock = Clock()
    constraining = Constraining(0, clock=clock)
    slow = [sequence_of(n, [1], Slow(clock, mask_s=0.03)) for n in range(5)]
    hosted = [*slow[:2], sequence_of(5, [1], None), *slow[2:]]
    turns = [step(constraining, hosted) for _ in range(12)]
    # 50 ms are over with the second; who is not constrained never waits.
    assert turns[:3] == [["r0", "r1", "r5"], ["r5", "r2", "r3"], ["r0", "r5", "r4"]]
    assert all(len(names) == 3 for names in turns)
    for first in range(len(turns) - 2):
        served = {name for names in turns[first : first + 3] for name in names}
        assert len(served) == 6, "nobody sits out more than two steps in a row"
    constraining.forget(slow[1])
    assert step(constraining, [hosted[0]]) == ["r0"]


def test_one_that_takes_longer_than_a_step_may_goes_on_nevertheless() -> None:
    clock = Clock()
    constraining = Constraining(0, clock=clock)
    both = [sequence_of(n, [1], Slow(clock, mask_s=0.3)) for n in range(2)]
    assert [step(constraining, both) for _ in range(4)] == [["r0"], ["r1"], ["r0"], ["r1"]]


def test_what_takes_long_to_be_followed_is_followed_over_several_steps() -> None:
    clock = Clock()
    constraining = Constraining(0, clock=clock)
    long = sequence_of(0, [1] * 40, Slow(clock, mask_s=0.001, take_s=0.01))
    short = sequence_of(1, [1], Slow(clock, mask_s=0.001))
    turns: list[list[str]] = []
    while not turns or "r0" not in turns[-1]:
        before_s = clock.now_s
        turns.append(step(constraining, [long, short]))
        assert clock.now_s - before_s < 0.2
    assert len(turns) > 2 and all("r1" in names for names in turns[:-1])


def test_what_is_told_is_all_that_the_grammar_took() -> None:
    clock, told = Clock(), list[float]()
    constraining = Constraining(0, told.append, clock)
    step(constraining, [sequence_of(0, [1, 1, 1], Slow(clock, mask_s=0.01, take_s=0.002))])
    assert told == [pytest.approx(0.016)]


@pytest.fixture(scope="module")
def table() -> TokenTable:
    table = TokenTable.load(DEMO, 4096)
    assert table is not None
    return table


def matcher_of(table: TokenTable, constraint: types_pb2.Constraint) -> AnswerMatcher:
    return AnswerMatcher(compile_constraint(constraint, table))


def test_an_error_behind_guesses_is_none_of_the_answer(table: TokenTable) -> None:
    """The grammar becomes too much work some tokens further on, which may never be drawn."""
    lark = f'start: s\ns: "a" | "b" | "ab" | "aa" | {MANY}'
    compiled = compile_constraint(types_pb2.Constraint(lark=lark), table)
    [a] = table.encode(b"a")
    plain, last = AnswerMatcher(compiled), 0
    with pytest.raises(InvalidField, match="too much work"):
        while True:
            plain.masks()
            last = plain.num_taken
            plain.take([a])
    alone = AnswerMatcher(compiled)
    alone.take([a] * last)
    expected = alone.masks()
    constraining = Constraining(0, clock=Clock())
    sequence = sequence_of(0, [a] * last, AnswerMatcher(compiled))
    part = part_of(sequence, [a] * 6)
    constraining.add_forced([part], lambda *_: True, 99)
    assert constraining.add_masks([part]) == [part]
    assert constraining.failure(sequence) is None
    assert part.draft_ids == () and part.num_tokens == 1
    assert part.masks is not None and np.array_equal(part.masks, expected)
    assert sequence.matcher is not None and sequence.matcher.num_allowed([a, a]) == 0
    # It is of the answer where the answer itself comes to it.
    sequence.output_token_ids += [a]
    part = part_of(sequence)
    constraining.add_forced([part], lambda *_: True, 99)
    constraining.add_masks([part])
    assert isinstance(constraining.failure(sequence), InvalidField)


class Panic(BaseException):
    pass


def test_a_panic_over_guesses_ends_nothing(
    table: TokenTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panicking:
        def __getattr__(self, name: str) -> Any:
            raise Panic

    emitted = table.encode(b'{"a": [1, ')
    matcher = matcher_of(table, types_pb2.Constraint(json_schema="{}"))
    sequence = sequence_of(0, emitted, matcher)
    constraining = Constraining(0, clock=Clock())
    step(constraining, [sequence])
    monkeypatch.setattr(matcher, "_grammar", Panicking())
    assert matcher.num_allowed(table.encode(b"2")) == 0
    assert step(constraining, [sequence]) == ["r0"]
    assert constraining.failure(sequence) is None and matcher.num_taken == len(emitted)


def test_what_guesses_are_looked_at_for_is_taken_of_the_step_too() -> None:
    clock = Clock()

    class Slower(Slow):
        def num_allowed(self, token_ids: Seq[int]) -> int:
            clock.now_s += 0.03
            return len(token_ids)

    constraining = Constraining(0, clock=clock)
    sequences = [sequence_of(n, [1], Slower(clock, mask_s=0.001)) for n in range(3)]
    free = sequence_of(3, [1], None)
    parts = [part_of(sequence) for sequence in (*sequences, free)]
    constraining.add_forced(parts, lambda *_: True, 99)
    # 50 ms are over with the second; who is not constrained pays nothing.
    allowed = [constraining.num_allowed(part.sequence, [5, 6]) for part in parts]
    assert allowed == [2, 2, 0, 2]
    assert [part.sequence for part in constraining.add_masks(parts)] == [sequences[0], free]


def test_to_wait_for_guesses_takes_none_of_the_grammars_time() -> None:
    clock = Clock()

    class Coming(list[int]):
        def __iter__(self) -> Iterator[int]:
            clock.now_s += 0.2
            return super().__iter__()

    class Looking(Slow):
        def num_allowed(self, token_ids: Seq[int]) -> int:
            return len([*token_ids])

    constraining = Constraining(0, clock=clock)
    sequences = [sequence_of(n, [1], Looking(clock, mask_s=0.001)) for n in range(2)]
    parts = [part_of(sequence) for sequence in sequences]
    constraining.add_forced(parts, lambda *_: True, 99)
    assert [constraining.num_allowed(each, Coming([5, 6])) for each in sequences] == [2, 2]
    assert clock.now_s > 0.3 and constraining.add_masks(parts) == parts


def test_a_token_that_was_drawn_against_its_mask_is_the_engines_failure(table: TokenTable) -> None:
    """And no word of tokens that a client would have sent."""
    matcher = matcher_of(table, types_pb2.Constraint(json_schema="{}"))
    sequence = sequence_of(0, table.encode(b"{]"), matcher)
    constraining = Constraining(0, clock=Clock())
    constraining.add_masks([part_of(sequence)])
    failure = constraining.failure(sequence)
    assert isinstance(failure, EngineFailure) and "token" in str(failure)
