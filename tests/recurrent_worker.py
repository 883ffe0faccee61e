"""A worker process that knows a model type with states: `python -m tests.recurrent_worker`."""

from __future__ import annotations

import sys

from baton.services.worker.__main__ import main
from tests.recurrent import known

if __name__ == "__main__":
    with known():
        sys.exit(main())
