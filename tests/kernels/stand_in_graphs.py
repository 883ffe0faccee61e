"""In place of CUDA graphs where there are none: what was captured is launched again."""

from __future__ import annotations

from collections.abc import Callable

from baton.shared.engine.graphs import Graph


class Again:
    def __init__(self, launch: Callable[[], None]) -> None:
        self._launch = launch

    def replay(self) -> None:
        self._launch()


class StandInGraphs:
    num_bytes = 0

    def __init__(self, num_refused: int = 0) -> None:
        """`num_refused`: so many find no memory."""
        self._num_refused = num_refused

    def capture(self, launch: Callable[[], None]) -> Graph:
        return Again(launch)

    def cut(self) -> None:
        """What was captured is launched as a whole."""

    def capture_if_room(self, launch: Callable[[], None]) -> Graph | None:
        launch()
        self._num_refused -= 1
        return None if self._num_refused >= 0 else Again(launch)
