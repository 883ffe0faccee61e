"""Where log lines go: an open file that may never hold its writer up.

Whoever starts a server with a pipe for its log may stop reading it, or go away; a terminal may be
frozen, a disk full. A line that would have to wait, or cannot be written, is lost then, and the
next one that gets through is told how many were.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import TextIO

_PIECE_BYTES = select.PIPE_BUF
"""What a pipe, a terminal or a socket takes at once when it says that it takes something."""


class LogOutput:
    """One writer, whole lines. Safe where nothing reads, and where there is no file at all."""

    def __init__(
        self, stream: Callable[[], TextIO | None], describe_loss: Callable[[int], str]
    ) -> None:
        """`stream`: what is written to now. `describe_loss`: number of lines → the line that tells
        of them."""
        self._stream = stream
        self._describe_loss = describe_loss
        self._num_lost = 0
        self._is_cut = False
        """The last line that was begun lacks its end."""

    def write(self, line: str) -> None:
        """`line` without its end. Returns at once, written or not."""
        lines = [line]
        if self._num_lost:
            lines.insert(0, self._describe_loss(self._num_lost))
        if self._write("".join(f"{each}\n" for each in lines)):
            self._num_lost = 0
        else:
            self._num_lost += 1

    def _write(self, text: str) -> bool:
        stream = self._stream()
        if stream is None:
            return False
        try:
            descriptor = stream.fileno()
        except (OSError, ValueError):
            return _write_to_object(stream, text)
        data = text.encode(stream.encoding or "utf-8", "backslashreplace")
        return self._write_to_file(descriptor, b"\n" + data if self._is_cut else data)

    def _write_to_file(self, descriptor: int, data: bytes) -> bool:
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        num_written = 0
        try:
            while num_written < len(data):
                if not any(events & select.POLLOUT for _, events in poll.poll(0)):
                    break
                num_written += os.write(descriptor, data[num_written:][:_PIECE_BYTES])
        except OSError:
            # Nobody will read it, or the disk is full.
            pass
        if num_written:
            self._is_cut = num_written < len(data)
        return num_written == len(data)


def _write_to_object(stream: TextIO, text: str) -> bool:
    """What stands for a file and is none."""
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):
        return False
    return True
