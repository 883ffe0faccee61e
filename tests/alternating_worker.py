"""A worker process that knows the tests' own model type: `python -m tests.alternating_worker`."""

from __future__ import annotations

import sys

from baton.services.worker.__main__ import main
from tests.alternating import register

if __name__ == "__main__":
    register()
    sys.exit(main())
