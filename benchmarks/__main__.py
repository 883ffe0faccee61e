"""All benchmarks, one after another: `make bench`."""

from __future__ import annotations

from benchmarks import streams

if __name__ == "__main__":
    streams.main([])
