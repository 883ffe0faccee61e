"""What a process tells of itself: its log, counters, and a trace of events on request.

The log has one line for each event: constant words, and fields. As text

    14:31:07 gateway WARNING attempt failed request_id=8d0c4a-17 attempt=1 cause=worker_lost

or, with --log-format json, as one object. No field can break its line, and no prompt or answer is
ever logged.

A trace is a file of JSON lines, one event each, stamped with the host's monotonic clock, so that
the traces of processes on one host can be laid side by side.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from baton.shared.log_output import LogOutput
from baton.shared.rpc.flags import add_flag

if TYPE_CHECKING:
    from baton.shared.kv.sequence import AttemptKey

LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")

_LONGEST_VALUE = 2000
"""Characters that are written of a field; a traceback is not cut."""


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
        """What is told afterwards, of requests that are just cut off, is not written."""
        if self._file is not None:
            self._file.close()
            self._file = None


NO_TRACE = Trace(None, "")


class Counters(Counter[str]):
    """Counts from the start of the process; names as in the protos, without `num_`."""


def baton_version() -> str:
    try:
        return version("baton-llm")
    except PackageNotFoundError:
        return "unknown"


def add_log_flags(parser: argparse.ArgumentParser) -> None:
    """`--log-format` and `--log-level`, for `configure_logging`."""
    add_flag(
        parser,
        "--log-format",
        type=str,
        default="text",
        choices=LOG_FORMATS,
        help="a line of the log: text, or a JSON object",
    )
    add_flag(
        parser,
        "--log-level",
        type=str,
        default="info",
        choices=LOG_LEVELS,
        help="the least serious events that are logged",
    )


def configure_logging(
    name: str, *, role: str = "", log_format: str = "text", log_level: str = "info"
) -> None:
    """Logs to standard error; standard output is for READY lines and answers.

    `name` is the worker's id, or "gateway"; `role` what it does.
    """
    handler = _LogHandler()
    handler.setFormatter(JsonLines(name, role) if log_format == "json" else TextLines(name))
    logging.basicConfig(handlers=[handler], level=log_level.upper())


def log_event(
    logger: logging.Logger,
    level: int,
    event: str,
    *,
    key: AttemptKey | None = None,
    exc_info: bool | BaseException = False,
    **fields: object,
) -> None:
    """Logs what happened: `event` in constant words, whatever varies as fields.

    `key` becomes the fields request_id and attempt. `exc_info`: True within an except clause, or
    the exception, whose traceback is to be told.
    """
    if not logger.isEnabledFor(level):
        return
    if key is not None:
        fields = {"request_id": key.request_id, "attempt": key.attempt, **fields}
    # The record keeps the fields as `extra` does; stacklevel 2 is who called this.
    logger.log(level, event, extra={"fields": fields}, exc_info=exc_info or None, stacklevel=2)


class _LogHandler(logging.Handler):
    """To standard error, as long as somebody takes the lines."""

    def __init__(self) -> None:
        super().__init__()
        self._output = LogOutput(lambda: sys.stderr, self._describe_loss)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
        else:
            self._output.write(line)

    def _describe_loss(self, num_lines: int) -> str:
        fields = {"num_lines": num_lines}
        about = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"}
        record = {**about, "msg": "log lines were lost: nobody took them", "fields": fields}
        return self.format(logging.makeLogRecord(record))


class TextLines(logging.Formatter):
    """HH:MM:SS NAME LEVEL event field=value …, in the host's time zone; no fields that are None."""

    def __init__(self, name: str) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._name = name

    def format(self, record: logging.LogRecord) -> str:
        when = self.formatTime(record, self.datefmt)
        event = _one_line(record.getMessage())
        parts = [when, self._name, record.levelname, event]
        fields = _fields(record).items()
        parts += [f"{name}={_as_text(value)}" for name, value in fields if value is not None]
        if record.exc_info:
            parts.append(f"traceback={json.dumps(self.formatException(record.exc_info))}")
        return " ".join(parts)


class JsonLines(logging.Formatter):
    """One object a line; `time` is RFC 3339, in UTC."""

    def __init__(self, name: str, role: str) -> None:
        super().__init__()
        self._process = {"process": name, "role": role} if role else {"process": name}

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            **self._process,
            "logger": record.name,
            "event": record.getMessage(),
        }
        for name, value in _fields(record).items():
            # Fields that every line has must not be replaced.
            line[f"{name}_" if name in line else name] = _as_json(value)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    """Records of libraries have none."""
    fields: Mapping[str, object] = getattr(record, "fields", {})
    return fields


def _as_json(value: object) -> object:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        # JSON has neither NaN nor infinities.
        return round(value, 6) if abs(value) < float("inf") else str(value)
    return str(value)[:_LONGEST_VALUE]


def _as_text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)[:_LONGEST_VALUE]
    is_plain = text.isprintable() and text and not set(text) & set(' "=\\')
    return text if is_plain else json.dumps(text)


def _one_line(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)[1:-1]
