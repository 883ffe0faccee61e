"""What a process tells of itself: counters, and a trace of events on request.

A trace is a file of JSON lines, one event each, stamped with the host's monotonic clock, so that
the traces of processes on one host can be laid side by side.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TextIO


class Trace:
    """Writes events to `directory`/`name`.jsonl; does nothing without a directory."""

    def __init__(self, directory: Path | None, name: str) -> None:
        self._file: TextIO | None = None
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = (directory / f"{name}.jsonl").open("a", buffering=1)

    def emit(self, event: str, **fields: object) -> None:
        if self._file is not None:
            record = {"t": time.monotonic(), "event": event, **fields}
            self._file.write(json.dumps(record, default=str) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Counters(Counter[str]):
    """Counts from the start of the process; names as in the protos, without `num_`."""


def configure_logging(name: str) -> None:
    """Logs to standard error; standard output is for READY lines and answers."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format=f"%(asctime)s {name} %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
