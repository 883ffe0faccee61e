"""Ctrl-C ends a benchmark with one line; what it has started goes by its own `finally`."""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_INTERRUPTED = 130


def exit_code(main: Callable[[], int | None]) -> int:
    """Of the program: `main`'s, 0 for None, or 130 when it was interrupted."""
    try:
        return main() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
