"""A worker: `python -m baton.services.worker --role prefill|decode|both --help`. It imports nothing
that takes time before Ctrl-C is waited for."""

from __future__ import annotations

import sys

from baton.shared.interrupt import exit_code


def main(*, role: str | None = None) -> int:
    """`role`: of a program that has one role only, and no flag for it."""

    def run() -> int:
        from baton.services.worker.process import main

        return main(role=role)

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
