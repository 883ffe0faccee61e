"""Lines of the log: one for an event, whatever its fields hold."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest

from baton.shared.kv.sequence import AttemptKey
from baton.shared.telemetry import JsonLines, TextLines, log_event

HOSTILE = 'a\nb\r\x1b[31m\u2028"c" = \\d\x00'


class Log:
    def __init__(self, logger: logging.Logger, stream: io.StringIO) -> None:
        self.logger = logger
        self._stream = stream

    @property
    def lines(self) -> list[str]:
        text = self._stream.getvalue()
        assert text.endswith("\n") or not text
        return text.splitlines()


def log_to(formatter: logging.Formatter) -> Iterator[Log]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.Logger("some.module", logging.INFO)
    logger.addHandler(handler)
    yield Log(logger, stream)


@pytest.fixture
def text() -> Iterator[Log]:
    yield from log_to(TextLines("decode-0"))


@pytest.fixture
def json_log() -> Iterator[Log]:
    yield from log_to(JsonLines("decode-0", "decode"))


def test_text_is_a_time_a_name_a_level_the_event_and_its_fields(text: Log) -> None:
    key = AttemptKey("8d0c4a-17", 0, 2)
    log_event(text.logger, logging.WARNING, "attempt failed", key=key, num_tokens=3, ttft_s=1 / 3)
    [line] = text.lines
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d decode-0 WARNING attempt failed"
        r" request_id=8d0c4a-17 attempt=2 num_tokens=3 ttft_s=0\.333333",
        line,
    )


@pytest.mark.parametrize("value", ["", "two words", 'quo"te', "a=b", HOSTILE])
def test_text_quotes_what_could_be_taken_for_something_else(text: Log, value: str) -> None:
    log_event(text.logger, logging.INFO, "event", value=value, last=1)
    [line] = text.lines
    assert line.isprintable() and line.endswith(" last=1")
    quoted = line.partition(" value=")[2].removesuffix(" last=1")
    assert json.loads(quoted) == value


def test_what_is_none_is_left_out_of_text_and_null_in_json(text: Log, json_log: Log) -> None:
    for log in (text, json_log):
        log_event(log.logger, logging.INFO, "event", ttft_s=None, num_tokens=0)
    assert text.lines[0].endswith(" event num_tokens=0")
    record = json.loads(json_log.lines[0])
    assert (record["ttft_s"], record["num_tokens"]) == (None, 0)


def test_json_has_time_level_process_event_and_fields(json_log: Log) -> None:
    key = AttemptKey("8d0c4a-17", 0, 2)
    log_event(json_log.logger, logging.ERROR, "pull failed", key=key, message=HOSTILE, t_s=0.5)
    [line] = json_log.lines
    record = json.loads(line)
    when = datetime.fromisoformat(record.pop("time"))
    assert when.utcoffset() == timedelta(0)
    assert record == {
        "level": "ERROR",
        "process": "decode-0",
        "role": "decode",
        "logger": "some.module",
        "event": "pull failed",
        "request_id": "8d0c4a-17",
        "attempt": 2,
        "message": HOSTILE,
        "t_s": 0.5,
    }


def test_fields_do_not_replace_what_every_json_line_has(json_log: Log) -> None:
    log_event(json_log.logger, logging.INFO, "event", time="never", role="intruder")
    record = json.loads(json_log.lines[0])
    assert record["time"] != "never" and record["role"] == "decode"
    assert record["time_"] == "never" and record["role_"] == "intruder"


def test_json_stays_json_with_numbers_that_are_none(json_log: Log) -> None:
    log_event(json_log.logger, logging.INFO, "event", rate=float("inf"), other=float("nan"))
    parsed = json.loads(json_log.lines[0], parse_constant=pytest.fail)
    assert (parsed["rate"], parsed["other"]) == ("inf", "nan")


@pytest.mark.parametrize("name", ["text", "json_log"])
def test_a_traceback_stays_on_its_line(name: str, request: pytest.FixtureRequest) -> None:
    log: Log = request.getfixturevalue(name)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log_event(log.logger, logging.ERROR, "it failed", exc_info=True, worker="w")
    [line] = log.lines
    assert line.isprintable() and "ValueError" in line and "test_log_lines.py" in line


@pytest.mark.parametrize("name", ["text", "json_log"])
def test_lines_of_libraries_are_lines_too(name: str, request: pytest.FixtureRequest) -> None:
    log: Log = request.getfixturevalue(name)
    log.logger.warning("from a library: %s", HOSTILE)
    [line] = log.lines
    assert line.isprintable() and "from a library: a" in line


def test_a_field_has_its_limit(text: Log, json_log: Log) -> None:
    for log in (text, json_log):
        log_event(log.logger, logging.INFO, "event", value="x" * 1_000_000)
        assert len(log.lines[0]) < 3000


def test_what_is_below_the_level_costs_no_line(text: Log) -> None:
    class Costly:
        def __str__(self) -> str:
            raise AssertionError("nobody reads this")

    log_event(text.logger, logging.DEBUG, "event", value=Costly())
    assert text.lines == []
