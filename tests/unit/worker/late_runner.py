"""A runner whose steps are computed when their result is taken, as late as on a GPU.

What a step may write to, and read from, must therefore stay as it was when it was launched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from baton.shared.engine.batch import Batch
from baton.shared.engine.executor import Copied, Step
from baton.shared.engine.kv_cache import SlotCopy
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.drawn import Drawn, TokenLogprobs
from baton.shared.token_masks import TokenMasks


@dataclass
class LateStep:
    runner: ModelRunner
    batch: Batch
    step: Step | None = None
    copies: list[SlotCopy] = field(default_factory=list)
    """Asked for behind it."""

    def result(self) -> list[Sequence[Drawn]]:
        self.step = self.runner.launch(self.batch)
        self.runner.copy_slots(self.copies)
        return self.step.result()

    def taps(self, row: int) -> Tensor | None:
        assert self.step is not None
        return self.step.taps(row)

    def prompt_logprobs(self, row: int) -> Sequence[TokenLogprobs | None]:
        assert self.step is not None
        return self.step.prompt_logprobs(row)


@dataclass
class LateBegun:
    runner: LateRunner
    batch: Batch

    def draw(self, masks: Mapping[int, TokenMasks]) -> LateStep:
        assert self.runner.begun is self, "others were launched behind it, or it has drawn"
        self.runner.begun = None
        for index, row in enumerate(self.batch.rows):
            row.masks = masks.get(index, row.masks)
            # The device knows: all steps before have run.
            if row.token_ids is None and row.handle is not None:
                row.token_ids = (row.handle.drawn_token,)
        self.runner.last = LateStep(self.runner.engine, self.batch)
        return self.runner.last


class LateRunner:
    """Stands in for a ModelRunner that runs a step ahead."""

    steps_ahead = 1

    def __init__(self, runner: ModelRunner) -> None:
        self.engine = runner
        self.begun: LateBegun | None = None
        """A step that has not drawn yet."""
        self.last: LateStep | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def launch(self, batch: Batch) -> LateStep:
        self.last = LateStep(self.engine, self._kept(batch))
        return self.last

    def copy_slots(self, copies: Sequence[SlotCopy]) -> Copied:
        assert self.begun is None, "it would be copied before its step"
        if self.last is None or self.last.step is not None:
            return self.engine.copy_slots(copies)
        self.last.copies += copies
        return Copied()

    def begin(self, batch: Batch) -> LateBegun:
        self.begun = LateBegun(self, self._kept(batch))
        return self.begun

    def _kept(self, batch: Batch) -> Batch:
        assert self.begun is None, "what it draws may be needed"
        # The device has its own block tables and token ids: those of the host go on meanwhile.
        rows = [
            replace(
                row,
                token_ids=None if row.token_ids is None else tuple(row.token_ids),
                block_tables=[list(table) for table in row.block_tables],
            )
            for row in batch.rows
        ]
        return Batch(rows)
