from __future__ import annotations

import pytest

from baton.services.launcher.policy import (
    SETTLED_S,
    Verdict,
    describe_exit,
    failures_in_a_row,
    judge_exit,
    pause_s,
)


def test_the_pause_doubles_up_to_five_seconds() -> None:
    pauses = [pause_s(n) for n in range(1, 8)]
    assert pauses == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])
    assert pause_s(100_000) == 5.0


def test_a_role_that_ran_long_starts_counting_anew() -> None:
    assert failures_in_a_row(0, uptime_s=0.1) == 1
    assert failures_in_a_row(4, uptime_s=0.1) == 5
    assert failures_in_a_row(4, uptime_s=SETTLED_S) == 1


@pytest.mark.parametrize(
    ("returncode", "num_exits", "stack_was_ready", "draining", "verdict"),
    [
        (2, 1, False, False, Verdict.MISCONFIGURED),
        (2, 1, True, False, Verdict.RESTART),
        (1, 1, False, False, Verdict.RESTART),
        (1, 2, False, False, Verdict.RESTART),
        (1, 3, False, False, Verdict.HOPELESS),
        (-9, 3, False, False, Verdict.HOPELESS),
        (0, 1, True, False, Verdict.RESTART),
        (-9, 1, False, False, Verdict.RESTART),
        (-9, 17, True, False, Verdict.RESTART),
        (2, 3, False, True, Verdict.GONE),
        (-9, 3, True, True, Verdict.GONE),
    ],
)
def test_what_an_exit_leads_to(
    returncode: int, num_exits: int, stack_was_ready: bool, draining: bool, verdict: Verdict
) -> None:
    judged = judge_exit(
        returncode, num_exits=num_exits, stack_was_ready=stack_was_ready, draining=draining
    )
    assert judged is verdict


def test_exits_are_told_in_words() -> None:
    assert describe_exit(3) == "exited with code 3"
    assert describe_exit(-9) == "was killed by SIGKILL"
    limit = "800 MiB (/sys/fs/cgroup/memory.max)"
    assert describe_exit(1, memory_limit=limit) == "exited with code 1"
    assert describe_exit(-9, memory_limit=limit) == (
        "was killed for want of memory, the limit is 800 MiB (/sys/fs/cgroup/memory.max)"
    )
    # Real-time signals between the named ends have no name.
    assert describe_exit(-40) == "was killed by signal 40"
