"""The `baton` command. It imports nothing that takes time before Ctrl-C is waited for."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from baton.services.launcher.stubs import why_stale
from baton.shared.interrupt import exit_code


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    if (problem := why_stale()) is not None:
        sys.stderr.write(f"baton: {problem}\n")
        return 2
    from baton.services.launcher.commands import run

    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
