"""Starts one role so that it cannot outlive the launcher: `child.py LAUNCHER_PID PROGRAM ARG...`.

The kernel is asked to send SIGTERM when the launcher dies, however it dies; then this process
becomes the role. Run as a program of its own because code between fork and exec (`preexec_fn`) may
deadlock in a process that has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    launcher_pid, program = int(argv[0]), argv[1:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # The launcher may have died before the kernel had been asked.
    if os.getppid() != launcher_pid:
        sys.exit("the launcher is gone")
    os.execvp(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1:])
