"""Whether a step may take chunks of prompts along, beside streams that wait for their tokens.

Pure but for its memory: the mean time between a stream's tokens, over the last steps.
"""

from __future__ import annotations

_STEPS = 100
"""The mean reaches back about as far: less than an answer, more than a prompt."""
_LEAST_S = 1.0
"""So often a chunk goes along in any case: prompts are slow then, and never stuck."""


class Pacing:
    """`goal_s`: seconds per token of a stream on average; None: chunks may always go along.

    As long as the mean is below the goal a step takes all that its budget allows. Streams feel the
    mean of their steps and not each of them, and a large chunk costs less than small ones, so
    chunks are left out of steps and not made smaller.
    """

    def __init__(self, goal_s: float | None) -> None:
        self._goal_s = goal_s
        self._mean_s = 0.0
        self._last_chunk_s = 0.0

    def took_step(self, seconds: float, *, num_decoding: int) -> None:
        """Seconds since the step before ended, or since this one began if that is later."""
        if num_decoding:
            self._mean_s += (seconds - self._mean_s) / _STEPS

    def may_take_chunks(self, now_s: float, *, num_decoding: int) -> bool:
        """Asked when there are prompts to compute."""
        if self._goal_s is None or not num_decoding:
            return True
        if self._mean_s <= self._goal_s or now_s - self._last_chunk_s >= _LEAST_S:
            self._last_chunk_s = now_s
            return True
        return False
