"""What to do about a role that ended: a pure decision.

exit ── launcher is draining ────────────────────────────> GONE      expected
     ── code 2 before the stack was ever ready ──────────> MISCONFIGURED: take all down, exit 2
     ── the third time before the stack was ever ready ───> HOPELESS: take all down, exit 1
     ── anything else, code 0 included ──────────────────> RESTART   after a growing pause
"""

from __future__ import annotations

import enum
import signal

EXIT_MISCONFIGURED = 2

MOST_EXITS_BEFORE_READY = 3
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
# A role that ran this long had got over whatever made it fail before.
SETTLED_S = 30.0


class Verdict(enum.Enum):
    GONE = enum.auto()
    MISCONFIGURED = enum.auto()
    HOPELESS = enum.auto()
    RESTART = enum.auto()


def judge_exit(
    returncode: int, *, num_exits: int, stack_was_ready: bool, draining: bool
) -> Verdict:
    """`num_exits`: of this role so far, this one included."""
    if draining:
        return Verdict.GONE
    if stack_was_ready:
        return Verdict.RESTART
    if returncode == EXIT_MISCONFIGURED:
        return Verdict.MISCONFIGURED
    return Verdict.HOPELESS if num_exits >= MOST_EXITS_BEFORE_READY else Verdict.RESTART


def failures_in_a_row(previous: int, uptime_s: float) -> int:
    """The number of failures in a row, with the one that happened now after `uptime_s`."""
    return 1 if uptime_s >= SETTLED_S else previous + 1


def pause_s(num_failures: int) -> float:
    """The pause before the next start, after `num_failures` ≥ 1 in a row."""
    # The exponent is bounded too: 2.0 ** 1100 is an OverflowError.
    return float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(num_failures - 1, 16)))


def describe_exit(returncode: int, *, memory_limit: str | None = None) -> str:
    """`returncode` as subprocess has it: negative for a signal; `memory_limit`: the one that was
    passed meanwhile, if one was."""
    if returncode == -signal.SIGKILL and memory_limit is not None:
        return f"was killed for want of memory, the limit is {memory_limit}"
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"
