"""A runner whose steps are computed when their result is taken, as late as on a GPU.

What a step may write to, and read from, must therefore stay as it was when it was launched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from baton.shared.engine.batch import Batch
from baton.shared.engine.executor import Step
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.drawn import Drawn, TokenLogprobs


@dataclass
class LateStep:
    runner: ModelRunner
    batch: Batch
    step: Step | None = None

    def result(self) -> list[Sequence[Drawn]]:
        self.step = self.runner.launch(self.batch)
        return self.step.result()

    def prompt_logprobs(self, row: int) -> Sequence[TokenLogprobs | None]:
        assert self.step is not None
        return self.step.prompt_logprobs(row)


class LateRunner:
    """Stands in for a ModelRunner that runs a step ahead."""

    steps_ahead = 1

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def launch(self, batch: Batch) -> LateStep:
        # The device has its own block tables and token ids: those of the host go on meanwhile.
        rows = [
            replace(
                row,
                token_ids=None if row.token_ids is None else tuple(row.token_ids),
                block_tables=[list(table) for table in row.block_tables],
            )
            for row in batch.rows
        ]
        return LateStep(self._runner, Batch(rows))
