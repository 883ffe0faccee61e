"""A worker of the role prefill as a process: `python -m baton.services.prefill --help`."""

from __future__ import annotations

import sys

from baton.services.worker.__main__ import main

if __name__ == "__main__":
    sys.exit(main(role="prefill"))
