"""The gateway: `python -m baton.services.gateway --help`. It imports nothing that takes time before
Ctrl-C is waited for."""

from __future__ import annotations

import sys

from baton.shared.interrupt import exit_code


def _run() -> int:
    from baton.services.gateway.process import main

    return main()


if __name__ == "__main__":
    sys.exit(exit_code(_run))
