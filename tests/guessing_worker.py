"""A worker process that guesses whatever the machine is busy with: steps take a planted time, which
guesses add nothing to. `python -m tests.guessing_worker`."""

from __future__ import annotations

import sys
from unittest.mock import patch

from baton.services.decode.draft_lengths import DraftLengths
from baton.services.worker.__main__ import main

_STEP_S = 0.001


def planted(lengths: DraftLengths, seconds: float, *, num_rows: int, num_guesses: int) -> None:
    took_step(lengths, _STEP_S, num_rows=num_rows, num_guesses=num_guesses)


took_step = DraftLengths.took_step

if __name__ == "__main__":
    with patch.object(DraftLengths, "took_step", planted):
        sys.exit(main())
