"""Server-sent events, as OpenAI's API streams them: the data of each, from bytes. Pure."""

from __future__ import annotations

_MAX_EVENT_BYTES = 8 << 20


class EventTooLong(Exception):
    """A line without end."""


class EventReader:
    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the lines that are whole now; an API of tokens uses one line an event.
        Raises EventTooLong."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise EventTooLong
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
