"""What a step needs and gives, whatever computes it.

`HostExecutor` (host_executor.py) prepares each step with numpy and runs the torch reference: the
CPU path. `DeviceExecutor` (device_executor.py) keeps the sequences' state on the GPU and runs the
Triton kernels. Both take the same batches and the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

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


class Taps(NamedTuple):
    """Where a forward pass leaves hidden states of its middle, for who guesses by them."""

    layers: tuple[int, ...]
    """Behind how many layers each is taken; 0: the embedding."""
    out: Tensor
    """[T, taps, hidden]"""

    def take(self, num_layers: int, hidden: Tensor) -> None:
        """hidden [T, hidden], behind so many layers."""
        for place, wanted in enumerate(self.layers):
            if wanted == num_layers:
                self.out[:, place].copy_(hidden)


@dataclass(frozen=True, slots=True)
class Tapped:
    """Which hidden states steps tell (`Step.taps`)."""

    layers: tuple[int, ...]
    """As of `Taps`."""
    hidden_size: int
    dtype: torch.dtype
    """Of activations."""
    to_the_end: bool = False
    """Some are behind the last layer that stores anything: all tokens go through all layers."""
    takes_features: bool = False
    """The model guesses by them: with each token it takes such a state, of another or its own."""

    def make(self, num_tokens: int, device: torch.device) -> Taps:
        """Room for so many tokens' states; what is in it may be anything."""
        shape = (num_tokens, len(self.layers), self.hidden_size)
        return Taps(self.layers, torch.empty(shape, dtype=self.dtype, device=device))

    def make_inputs(self, num_tokens: int, device: torch.device) -> dict[str, Any]:
        """What the model gets by name beside so many tokens, and fills."""
        inputs: dict[str, Any] = {"taps": self.make(num_tokens, device)}
        if self.takes_features:
            shape = (num_tokens, self.hidden_size)
            inputs["features"] = torch.zeros(shape, dtype=self.dtype, device=device)
        return inputs


@dataclass(frozen=True, slots=True)
class ChainShape:
    """How large the chains of a model that guesses may be."""

    num_guesses: int
    most_known: int
    """Tokens that a chain's first step computes of a row."""
    state_size: int = 0
    """Of a head: numbers that come with each of them, of the larger model's hidden states."""


class Model(Protocol):
    """The forward pass of shared/engine/models/*.py."""

    def hidden_states(
        self,
        input_ids: Tensor,
        positions: Tensor,
        caches: Sequence[object],
        plans: Sequence[object],
        wanted: Wanted | None = None,
    ) -> Tensor:
        """Some take more, by name: `taps`, which it fills, and of who guesses by another's hidden
        states `features` [T, hidden], which come with the tokens."""

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
        *,
        taps: Taps | None = None,
    ) -> Halfway: ...

    def finish(
        self, halfway: Halfway, caches: Sequence[object], plans: Sequence[object]
    ) -> Tensor: ...


@runtime_checkable
class HeadModel(Model, Protocol):
    """One that guesses by hidden states of another: with each token it takes `features`, what came
    of the token before it, and tells as the one tap behind its layer what comes with the next."""

    hidden_size: int
    """Of what comes with a token."""
    embedding: Tensor | None
    """[vocab, hidden]; None until it is given the other model's, where it has none of its own."""

    def fuse(self, taps: Tensor) -> Tensor:
        """The other model's hidden states [T, taps · hidden] → features [T, hidden]."""


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

    def taps(self, row: int) -> Tensor | None:
        """Of an executor that tells hidden states: [tokens of the row, taps · hidden], guesses that
        fell included, on the device, behind what was launched so far. None: not told of it."""


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

    def computing(self, inputs: Sequence[Tensor]) -> AbstractContextManager[object]:
        """What is computed within comes behind the steps that were launched and before those that
        are yet to be. `inputs`: made elsewhere, and done."""

    def logits(self, batch: Batch) -> Tensor:
        """Computes a step, draws nothing → float32 [logits, vocab]: at each row's last
        `num_logits` tokens, row by row."""
