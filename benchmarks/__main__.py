"""The benchmark that needs neither a GPU nor an endpoint, `make bench`: it is
`python -m benchmarks.streams`, with its flags."""

from __future__ import annotations

import sys

from baton.loadtest.interrupt import exit_code
from benchmarks import streams

if __name__ == "__main__":
    sys.exit(exit_code(streams.main))
