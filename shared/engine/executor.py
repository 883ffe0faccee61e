"""What a step needs and gives, whatever computes it.

`HostExecutor` (host_executor.py) prepares each step with numpy and runs the torch reference: the
CPU path. `DeviceExecutor` (device_executor.py) keeps the sequences' state on the GPU and runs the
Triton kernels. Both take the same batches and the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from baton.shared.engine.batch import Batch, RowHandle
from baton.shared.engine.kv_cache import KvCache, SlotCopy
from baton.shared.engine.shaping import History
from baton.shared.kv.drawn import Drawn, TokenLogprobs
from baton.shared.sampling import SamplingParams
from baton.shared.token_masks import TokenMasks

Wanted = tuple[Tensor, Sequence[object]]
"""Which tokens of a step, int [R], and by cache group the plan of these alone."""


Between = Callable[[int, int], None]
"""Told between a model's layers how many are done, and of how many."""


class Model(Protocol):
    """The forward pass of shared/engine/models/*.py."""

    def hidden_states(
        self,
        input_ids: Tensor,
        positions: Tensor,
        caches: Sequence[object],
        plans: Sequence[object],
        wanted: Wanted | None = None,
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


@runtime_checkable
class HalvesModel(Model, Protocol):
    """One whose forward pass has two halves, as that of shared/engine/models/decoder.py."""

    def begin(
        self,
        input_ids: Tensor,
        positions: Tensor,
        caches: Sequence[object],
        plans: Sequence[object],
        between: Between | None = None,
    ) -> Halfway: ...

    def finish(
        self, halfway: Halfway, caches: Sequence[object], plans: Sequence[object]
    ) -> Tensor: ...


class Halfway(NamedTuple):
    """Tokens of a step in the middle of the last layer that stores anything: from here on, those
    that nobody wants may be left out."""

    query: Tensor
    """[T, num_heads, head_dim]"""
    hidden: Tensor
    """[T, hidden], the layer's input."""
    positions: Tensor
    """int [T]"""
    extra: Tensor | None
    """[T, num_layers, any size]: what layers get beside their input."""

    def at(self, tokens: Tensor) -> Halfway:
        """Of these tokens, int [R], alone."""
        return Halfway(
            self.query.index_select(0, tokens),
            self.hidden.index_select(0, tokens),
            self.positions.index_select(0, tokens),
            None if self.extra is None else self.extra.index_select(0, tokens),
        )


class Step(Protocol):
    """A step that was launched."""

    def result(self) -> list[Sequence[Drawn]]:
        """By row, what was drawn behind its last token: nothing where nothing was asked, one for
        each draft that stands more where there were drafts. To be called once; waits for the
        device."""

    def prompt_logprobs(self, row: int) -> Sequence[TokenLogprobs | None]:
        """What a row asked (`BatchRow.prompt_logprobs`); None where the logits were not numbers. To
        be called behind `result`."""


class BegunStep(Protocol):
    """A step that was begun: its forward pass was launched, and nothing is drawn yet."""

    def draw(self, masks: Mapping[int, TokenMasks]) -> Step:
        """Launches the draw. `masks`: of rows that were begun without theirs.

        To be called once, before another step is launched: that one may need what is drawn here.
        """


@dataclass(slots=True)
class StepCounts:
    """Steps with prompt chunks, since the start."""

    captured: int = 0
    """By graphs."""
    launched: int = 0
    """Kernel by kernel."""


@dataclass(frozen=True, slots=True)
class Copied:
    """Slots that are copied; on a GPU when `done` has happened."""

    done: torch.cuda.Event | None = None


class Executor(Protocol):
    """Launches steps, one after another, over one model and one cache."""

    kv_cache: KvCache
    num_prompt_steps: StepCounts

    def open_row(
        self, sampling: SamplingParams, sample_index: int, history: History | None = None
    ) -> RowHandle:
        """A place for a sequence. ValueError when all are taken, and when `sampling` asks what was
        before and nobody says."""

    def close_row(self, handle: RowHandle) -> None: ...

    @property
    def num_free_rows(self) -> int:
        """How many more may be opened."""

    def launch(self, batch: Batch) -> Step:
        """Starts a step; those launched run one after another.

        Raises:
            ValueError: a row is empty, too long, or names blocks that do not exist.
        """

    def begin(self, batch: Batch) -> BegunStep:
        """Starts a step that draws later, so that masks can be made while it computes. Raises as
        `launch` does."""

    def copy_slots(self, copies: Sequence[SlotCopy]) -> Copied:
        """Copies states, behind the steps that were launched and before those that are yet to
        be."""

    def logits(self, batch: Batch) -> Tensor:
        """Computes a step, draws nothing → float32 [logits, vocab]: at each row's last
        `num_logits` tokens, row by row."""
