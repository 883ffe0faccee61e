"""The `baton` command. It imports nothing that takes time before Ctrl-C is waited for."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from baton.shared.interrupt import exit_code


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    from baton.services.launcher.commands import run

    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
