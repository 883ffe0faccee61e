"""Log lines never hold up who writes them. A write that waits would hang these tests."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from typing import TextIO

import pytest

from baton.shared.log_output import LogOutput
from baton.shared.telemetry import configure_logging, log_event

_LINE = "x" * 99


class Pipe:
    def __init__(self) -> None:
        self.reader, descriptor = os.pipe()
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, 16384)
        os.set_blocking(self.reader, False)
        self.writer: TextIO = open(descriptor, "w", encoding="utf-8")
        self.output = LogOutput(lambda: self.writer, lambda num_lines: f"{num_lines} lost")

    def read(self) -> list[str]:
        return os.read(self.reader, 1 << 20).decode().splitlines()

    def close(self) -> None:
        os.close(self.reader)
        self.writer.close()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def test_lines_that_nobody_reads_are_lost_and_counted(pipe: Pipe) -> None:
    for _ in range(1000):
        pipe.output.write(_LINE)
    read = pipe.read()
    assert 0 < len(read) < 1000 and set(read) == {_LINE}

    pipe.output.write("again")
    pipe.output.write("and again")

    assert pipe.read() == [f"{1000 - len(read)} lost", "again", "and again"]


def test_a_line_that_was_cut_gets_its_end(pipe: Pipe) -> None:
    pipe.output.write("long" * 12000)
    assert pipe.read() == ["long" * 4096]
    pipe.output.write("next")
    assert pipe.read() == ["", "1 lost", "next"]


def test_who_writes_goes_on_when_the_reader_is_gone(pipe: Pipe) -> None:
    os.close(pipe.reader)
    for _ in range(3):
        pipe.output.write(_LINE)
    pipe.reader, _ = os.pipe()


def test_who_writes_goes_on_when_the_disk_is_full() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        output = LogOutput(lambda: full, str)
        for _ in range(3):
            output.write(_LINE)


def test_who_writes_goes_on_without_a_file() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        LogOutput(lambda stream=stream: stream, str).write(_LINE)  # type: ignore[misc]


def test_what_a_file_cannot_encode_is_escaped(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "log")
    with open(path, "w", encoding="ascii") as file:
        LogOutput(lambda: file, str).write("é \ud800")
    with open(path, encoding="ascii") as file:
        assert file.read() == "\\xe9 \\ud800\n"


def test_a_loss_is_told_in_the_logs_own_format(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.Logger("root")
    monkeypatch.setattr(logging, "root", root)
    monkeypatch.setattr(sys, "stderr", pipe.writer)
    configure_logging("decode-0", role="decode", log_format="json")
    for _ in range(1000):
        log_event(root, logging.INFO, "event")
    num_read = len(pipe.read())
    log_event(root, logging.INFO, "event")
    loss, event = map(json.loads, pipe.read())
    assert (loss["level"], loss["num_lines"]) == ("WARNING", 1000 - num_read)
    assert loss["process"] == event["process"] and event["event"] == "event"
