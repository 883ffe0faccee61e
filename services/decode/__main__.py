"""A worker of the role decode as a process: `python -m baton.services.decode --help`."""

from __future__ import annotations

import sys

from baton.services.worker.__main__ import main

if __name__ == "__main__":
    sys.exit(main(role="decode"))
