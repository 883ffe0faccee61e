"""SequenceTable: one attempt of a sequence at a time, and no lower one ever again."""

from __future__ import annotations

import pytest

from baton.services.worker import sequence_table
from baton.services.worker.sequence_table import Recipient, SequenceTable
from baton.shared.kv.sequence import AttemptKey, Sequence, SequenceState
from baton.shared.sampling import SamplingParams


def key(attempt: int = 1, name: str = "r", sample: int = 0) -> AttemptKey:
    return AttemptKey(name, sample, attempt)


def sequence(of: AttemptKey) -> Sequence:
    return Sequence(of, (1, 2, 3), SamplingParams())


def test_who_was_seen_is_refused_again_also_when_gone() -> None:
    table = SequenceTable()
    table.add(sequence(key(2)), None)
    assert table.is_stale(key(1)) and table.is_stale(key(2)) and not table.is_stale(key(3))
    assert not table.is_stale(key(1, sample=1)), "another sample is another sequence"
    table.remove(key(2))
    assert table.is_stale(key(2))


def test_a_cancel_refuses_a_start_that_comes_later() -> None:
    table = SequenceTable()
    table.refuse_up_to(key(3))
    assert table.is_stale(key(3)) and not table.is_stale(key(4))


def test_a_late_cancel_does_not_let_lower_attempts_in_again() -> None:
    table = SequenceTable()
    table.refuse_up_to(key(5))
    table.refuse_up_to(key(2))
    assert table.is_stale(key(5))


def test_a_cancel_meets_its_own_attempt_and_lower_ones_only() -> None:
    table = SequenceTable()
    second = sequence(key(2))
    table.add(second, None)
    assert table.attempt_up_to(key(1)) is None
    assert table.attempt_up_to(key(2)) is second
    assert table.attempt_up_to(key(7)) is second
    assert table.attempt_up_to(key(7, "other")) is None
    table.remove(key(2))
    assert table.attempt_up_to(key(7)) is None


def test_removing_an_old_attempt_leaves_the_new_one_current() -> None:
    table = SequenceTable()
    table.add(sequence(key(1)), None)
    second = sequence(key(2))
    table.add(second, None)
    table.remove(key(1))
    assert table.attempt_up_to(key(2)) is second


def test_hosts() -> None:
    table = SequenceTable()
    prefilled, ours, others = (sequence(key(name=name)) for name in "abc")
    table.add(prefilled, None)
    table.add(ours, Recipient("g1", 7))
    table.add(others, Recipient("g2", 7))
    assert table.recipient(prefilled.key) is None and table.recipient(ours.key) == Recipient(
        "g1", 7
    )
    assert table.of_gateway("g1") == [ours]
    for each in (prefilled, ours):
        each.is_admitted = True
    assert table.growing() == [ours], "others hold nothing yet, a prefilled one does not grow"
    assert table.admitted() == [prefilled, ours], "in order of arrival"
    table.remove(ours.key)
    assert table.of_gateway("g1") == [] == table.growing()
    assert table.admitted() == [prefilled]
    assert table.recipient(ours.key) is None


def test_order_of_arrival_and_states() -> None:
    table = SequenceTable()
    made = [sequence(key(name=name)) for name in "abc"]
    for each in made:
        table.add(each, None)
    made[1].state = SequenceState.DECODING
    assert table.in_state(SequenceState.WAITING) == [made[0], made[2]]
    assert table.all() == made and len(table) == 3 and made[1].key in table


def test_what_is_remembered_is_bounded_and_the_oldest_goes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sequence_table, "_ATTEMPTS_REMEMBERED", 2)
    table = SequenceTable()
    for name in "ab":
        table.refuse_up_to(key(name=name))
    table.refuse_up_to(key(2, "a"))
    table.refuse_up_to(key(name="c"))
    assert table.is_stale(key(name="a")) and table.is_stale(key(name="c"))
    assert not table.is_stale(key(name="b"))
