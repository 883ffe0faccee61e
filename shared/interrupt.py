"""Ctrl-C ends a program with one line; what it has started is ended by its own `finally`."""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_INTERRUPTED = 130


def exit_code(main: Callable[[], int | None]) -> int:
    """The program's exit code: what `main` returns, 0 for None, or 130 after Ctrl-C."""
    try:
        return main() or 0
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED
