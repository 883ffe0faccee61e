"""What next after an error: policy, without I/O.

A call is tried again when another try may succeed and can do no harm. Questions about text, model
and server change nothing; an answer goes on where it broke (answer.py).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from baton_client.errors import BatonError, Cancelled, DeadlineExceeded, Unavailable

# The gateway itself tries again after these; when it gave up, or was stopped, another may succeed.
_PASSING = {
    "DRAINING",
    "OVERLOADED",
    "SOURCE_LOST",
    "WORKER_LOST",
    "PREEMPTED",
    "CLAIM_BROKEN",
    "DIGEST_MISMATCH",
}

_LONGEST_S = 1e9
"""gRPC takes longer deadlines for ones that have passed."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how soon; the deadline ends it in any case.

    Raises ValueError for numbers without a meaning.
    """

    max_tries: int = 10
    """In a row without a new token; 1 never tries again."""
    first_backoff_s: float = 0.1
    """Doubled with each try. Of each wait a random half is left out, so that the clients of a
    server that comes back do not come all at once."""
    max_backoff_s: float = 5.0

    def __post_init__(self) -> None:
        if self.max_tries < 1:
            raise ValueError(f"max_tries is {self.max_tries}: at least 1")
        if not 0 <= self.first_backoff_s <= self.max_backoff_s:
            raise ValueError(
                f"first_backoff_s is {self.first_backoff_s:g}: 0 to max_backoff_s, "
                f"{self.max_backoff_s:g}"
            )


NO_RETRY = RetryPolicy(max_tries=1)


def may_retry(error: BatonError) -> bool:
    """Whether another try may end otherwise."""
    # A cancel that this side did not ask for means that a server or proxy ended the stream.
    if isinstance(error, (Unavailable, Cancelled)):
        return True
    return error.reason in _PASSING


class Tries:
    """The tries of one call. Seconds are those of `clock`."""

    def __init__(
        self,
        policy: RetryPolicy,
        deadline_s: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`deadline_s` counts from now, over all tries; None: no deadline.

        Raises ValueError when it is no number.
        """
        if deadline_s is not None and math.isnan(deadline_s):
            raise ValueError("deadline_s is nan: seconds, or None for no deadline")
        self._policy = policy
        self._clock, self._draw = clock, draw
        self._deadline = None if deadline_s is None else clock() + deadline_s
        self._num_failed = 0

    def time_left_s(self) -> float | None:
        """Seconds left; None without a deadline. Raises DeadlineExceeded when none are left."""
        if self._deadline is None:
            return None
        time_left_s = self._deadline - self._clock()
        if time_left_s <= 0:
            raise DeadlineExceeded(
                "the deadline has passed", code=grpc.StatusCode.DEADLINE_EXCEEDED
            )
        return min(time_left_s, _LONGEST_S)

    def progressed(self) -> None:
        """A token came: whatever breaks next is another fault."""
        self._num_failed = 0

    def wait_s_after(self, error: BatonError) -> float:
        """Seconds to the next try. Raises `error` when there is none."""
        self._num_failed += 1
        if not may_retry(error) or self._num_failed >= self._policy.max_tries:
            raise error
        # A huge exponent would overflow, and makes no difference.
        backoff_s = self._policy.first_backoff_s * 2.0 ** min(self._num_failed - 1, 60)
        wait_s = min(backoff_s, self._policy.max_backoff_s) * (1 - self._draw() / 2)
        if self._deadline is not None and self._clock() + wait_s >= self._deadline:
            # What went wrong says more than the deadline that it used up.
            raise error
        return wait_s
