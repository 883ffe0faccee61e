"""When to try again, by a clock that stands still."""

from __future__ import annotations

import grpc
import pytest
from baton_client import BatonError, DeadlineExceeded, ServerError, Unavailable
from baton_client.errors import from_status
from baton_client.retry import RetryPolicy, Tries, may_retry
from baton_client.v1 import error_details_pb2
from baton_client.wire_pb2 import Status

GONE = Unavailable("gone", code=grpc.StatusCode.UNAVAILABLE)
WRONG = ServerError("wrong", code=grpc.StatusCode.INTERNAL, reason="ENGINE")
POLICY = RetryPolicy(max_tries=6, first_backoff_s=1.0, max_backoff_s=5.0)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def tries(deadline_s: float | None = None, *, drawn: float = 0.0) -> tuple[Tries, Clock]:
    clock = Clock()
    return Tries(POLICY, deadline_s, clock=clock, draw=lambda: drawn), clock


def test_waits_double_up_to_the_longest() -> None:
    whole, _ = tries()
    assert [whole.wait_s_after(GONE) for _ in range(5)] == [1, 2, 4, 5, 5]
    with pytest.raises(Unavailable):
        whole.wait_s_after(GONE)
    halved, _ = tries(drawn=1.0)
    assert [halved.wait_s_after(GONE) for _ in range(5)] == [0.5, 1, 2, 2.5, 2.5]


def test_many_tries_do_not_overflow() -> None:
    many = Tries(RetryPolicy(max_tries=5000), None, draw=lambda: 0.0)
    assert {many.wait_s_after(GONE) for _ in range(4999)} >= {5.0}


def test_progress_starts_the_count_anew() -> None:
    counted, _ = tries()
    for _ in range(20):
        assert [counted.wait_s_after(GONE) for _ in range(5)] == [1, 2, 4, 5, 5]
        counted.progressed()


def test_error_that_stays_is_raised_as_it_is() -> None:
    counted, _ = tries()
    with pytest.raises(ServerError) as raised:
        counted.wait_s_after(WRONG)
    assert raised.value is WRONG


@pytest.mark.parametrize(
    ("code", "reason", "is_retried"),
    [
        (grpc.StatusCode.UNAVAILABLE, "", True),
        (grpc.StatusCode.UNAVAILABLE, "DRAINING", True),
        (grpc.StatusCode.CANCELLED, "", True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "PREEMPTED", True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", True),
        (grpc.StatusCode.DATA_LOSS, "DIGEST_MISMATCH", True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "", False),
        (grpc.StatusCode.INTERNAL, "TOO_MANY_ATTEMPTS", False),
        (grpc.StatusCode.INVALID_ARGUMENT, "BAD_FIELD", False),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE", False),
        (grpc.StatusCode.UNAUTHENTICATED, "", False),
    ],
)
def test_by_status_and_reason(code: grpc.StatusCode, reason: str, is_retried: bool) -> None:
    metadata: list[tuple[str, str | bytes]] = []
    if reason:
        status = Status()
        failure = error_details_pb2.Failure(reason=f"FAILURE_REASON_{reason}", message="m")
        status.details.add().Pack(failure)
        metadata = [("grpc-status-details-bin", status.SerializeToString())]
    error = from_status(code, "d", metadata)
    assert (error.code, error.reason, error.message) == (code, reason, "m" if reason else "d")
    assert may_retry(error) is is_retried


def test_deadline_is_for_all_tries() -> None:
    counted, clock = tries(10.0)
    assert counted.time_left_s() == 10
    clock.now_s += 8
    assert counted.time_left_s() == 2
    assert counted.wait_s_after(GONE) == 1
    with pytest.raises(Unavailable):  # the next wait, 2 s, would end with the deadline
        counted.wait_s_after(GONE)
    clock.now_s += 2
    with pytest.raises(DeadlineExceeded):
        counted.time_left_s()


@pytest.mark.parametrize("deadline_s", [1e12, float("inf")])
def test_deadline_beyond_grpcs_has_not_passed(deadline_s: float) -> None:
    endless, _ = tries(deadline_s)
    assert endless.time_left_s() == 1e9


def test_deadline_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="nan"):
        tries(float("nan"))


@pytest.mark.parametrize("details", [b"\xff", Status(code=14, message="x").SerializeToString()])
def test_details_of_a_proxy_are_not_taken_for_ours(details: bytes) -> None:
    metadata = (("grpc-status-details-bin", details),)
    error = from_status(grpc.StatusCode.UNAVAILABLE, "no route", metadata)
    assert isinstance(error, Unavailable)
    assert (error.message, error.reason) == ("no route", "")


def test_policy_without_meaning_is_refused() -> None:
    for wrong in (
        {"max_tries": 0},
        {"first_backoff_s": -1.0},
        {"first_backoff_s": 2.0, "max_backoff_s": 1.0},
        {"first_backoff_s": float("nan")},
    ):
        with pytest.raises(ValueError, match="max_tries|backoff"):
            RetryPolicy(**wrong)


def test_every_error_says_its_code() -> None:
    assert str(GONE) == "UNAVAILABLE: gone"
    assert issubclass(Unavailable, BatonError)
