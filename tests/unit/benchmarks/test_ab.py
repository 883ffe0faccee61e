"""Who is measured when: neither arrangement always comes first."""

from __future__ import annotations

from benchmarks.ab import turns


def test_the_order_turns_from_one_workload_to_the_next() -> None:
    assert turns(["a"], ["pd", "both"]) == [("pd", ["a"]), ("both", ["a"])]
    assert turns(["a", "b", "c"], ["pd", "both"]) == [
        ("pd", ["a"]),
        ("both", ["a", "b"]),
        ("pd", ["b", "c"]),
        ("both", ["c"]),
    ]
