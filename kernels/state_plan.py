"""Where the rows of a step keep their states: what an operation with a state of constant size is
told beside its tokens.

Such an operation goes through a row's tokens one after another. It begins with what the row's slot
holds, or with zeros where the row's first token is its sequence's first; what it has behind the
row's last token it leaves in the slot. So a row must not be computed twice. Tokens behind those of
the last row are padding, and touch no slot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StatePlan:
    """R rows; all int64."""

    query_start: Ints
    """[R + 1]: tokens query_start[i] … query_start[i + 1] − 1 are row i's."""
    first_positions: Ints
    """[R]: of each row's first token."""
    slots: Ints
    """[R]"""

    def rows(self) -> Iterator[tuple[slice, int, bool]]:
        """By row: its tokens, its slot, and whether it begins with zeros."""
        for row, slot in enumerate(self.slots.tolist()):
            tokens = slice(int(self.query_start[row]), int(self.query_start[row + 1]))
            yield tokens, slot, not self.first_positions[row]
