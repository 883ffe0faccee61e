"""The decode service as a process, a worker of that role: `python -m services.decode --help`."""

from __future__ import annotations

import sys

from baton.services.worker.__main__ import main

if __name__ == "__main__":
    sys.exit(main(role="decode"))
