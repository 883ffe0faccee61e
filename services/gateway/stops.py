"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Finds the stop string that starts earliest, in text that comes in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(len(stop) for stop in stops)
        self.found: str | None = None
        """The stop string that ended the answer."""
        self._held = ""
        """Text that is not given out yet, since a stop string may begin with it. Never longer than
        the longest stop string."""

    def feed(self, text: str) -> tuple[str, bool]:
        """Returns (text that can be given out, whether the answer ends after it)."""
        if not text:
            return "", False
        held = self._held + text
        complete = self._first_complete(held)
        # Each step either ends the search or gives a character out for good, so the cost per
        # character is bounded by the number of stops.
        start = min(complete, max(0, len(held) - self._longest))
        while start < complete and not self._may_begin_stop(held[start:]):
            start += 1
        if start == complete < len(held):
            self.found = self._complete_at(complete, held)
            return held[:complete], True
        self._held = held[start:]
        return held[:start], False

    def flush(self, text: str) -> tuple[str, bool]:
        held = self._held + text
        complete = self._first_complete(held)
        if complete < len(held):
            self.found = self._complete_at(complete, held)
        return held[:complete], complete < len(held)

    def _first_complete(self, held: str) -> int:
        """Where the earliest complete stop string starts; where `held` ends if there is none."""
        starts = (held.find(stop) for stop in self._stops)
        return min((start for start in starts if start >= 0), default=len(held))

    def _complete_at(self, start: int, held: str) -> str:
        """Of several the shortest, which was complete first."""
        return min((stop for stop in self._stops if held.startswith(stop, start)), key=len)

    def _may_begin_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)
