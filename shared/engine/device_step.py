"""What a step on the device is made of: who is where in it, its buffers, and its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from baton.shared.engine.batch import BatchRow, RowHandle
from baton.shared.engine.device_logprobs import Told
from baton.shared.engine.device_plan import GroupPlan
from baton.shared.engine.graphs import Graph
from baton.shared.kv.drawn import Drawn, TokenLogprobs, drawn_of, with_logprobs
from baton.shared.token_masks import TokenMasks


@dataclass(slots=True)
class DeviceStep:
    """A step in flight."""

    wanted: list[int]
    """Row of the batch that each drawn token is for; −1: nobody wants it."""
    num_rows: int
    tokens: Tensor
    """int32 [≥ len(wanted)] on the host, once `done`; behind them, in a step with drafts, how many
    of each decode row's tokens stand."""
    done: torch.cuda.Event | None
    drafted: list[tuple[int, int, RowHandle, int]] = field(default_factory=list)
    """(row of the batch, where its count is in `tokens`, handle, number) of each row that brought
    drafts."""
    logprobs: Told | None = None
    """Of drawn tokens, if some are wanted."""
    of_prompts: dict[int, Told] = field(default_factory=dict)
    """By row of the batch that asked."""
    told: Mapping[int, Tensor] = field(default_factory=dict)
    """By row of the batch, hidden states, where they are told."""

    def result(self) -> list[Sequence[Drawn]]:
        if self.done is not None:
            self.done.synchronize()
        drawn: list[list[Drawn]] = [[] for _ in range(self.num_rows)]
        tokens = self.tokens.tolist()
        for row, token in zip(self.wanted, tokens, strict=False):
            if row >= 0:
                drawn[row].append(drawn_of(token))
        if self.logprobs is not None:
            self._add_logprobs(drawn, self.logprobs)
        for row, place, handle, num_drafts in self.drafted:
            num_standing = tokens[place]
            del drawn[row][num_standing:]
            handle.fell_short(1 + num_drafts - num_standing)
        return list(drawn)

    def prompt_logprobs(self, row: int) -> Sequence[TokenLogprobs | None]:
        return self.of_prompts[row].result()

    def taps(self, row: int) -> Tensor | None:
        return self.told.get(row)

    def _add_logprobs(self, drawn: list[list[Drawn]], told: Told) -> None:
        """All that are drawn for a row that asks are told of, in order."""
        num_told = [0] * self.num_rows
        for place, each in zip(told.places, told.result(), strict=True):
            row = self.wanted[place]
            at = num_told[row]
            drawn[row][at] = with_logprobs(drawn[row][at], each)
            num_told[row] += 1


@dataclass(slots=True)
class DeviceBegun:
    """A step whose forward pass is in flight."""

    rows: Sequence[BatchRow]
    finish: Callable[[], DeviceStep]
    computed: torch.cuda.Event | None
    """When its blocks are written."""

    @torch.inference_mode()
    def draw(self, masks: Mapping[int, TokenMasks]) -> DeviceStep:
        for row, of_row in masks.items():
            self.rows[row].masks = of_row
        return self.finish()


@dataclass(slots=True)
class DecodeBuffers:
    """What a decode step of one padded size and width reads and writes; a graph keeps their
    addresses."""

    size: int
    width: int
    input_ids: Tensor
    """int32 [size · width]"""
    positions: Tensor
    slots: Tensor
    """int64 [G, size · width]"""
    rows: Tensor
    """int32 [size]: the slots that decode."""
    token_rows: Tensor
    """int32 [size · width]: each token's slot; `rows` itself where the width is 1."""
    back: Tensor | None
    """int32 [size · width]; None where the width is 1."""
    results: Tensor
    """int32: drawn tokens [size · width], then, aligned, how many stand of each row [size]."""
    plans: list[GroupPlan]
    """By cache group."""
    inputs: Mapping[str, Any]
    """What the model gets, and fills, beside them."""
    graphs: tuple[Graph, Graph] | None = None
    """Of the forward pass and of the draw. The second reads what the first left in memory that all
    graphs share: no other is replayed between the two."""
    hidden: Tensor | None = None
    """[size · width, hidden], as the last step left it: what the head makes logits of."""
    logits: Tensor | None = None
    """[size · width, vocab], from the forward pass to the draw."""

    @property
    def tokens(self) -> Tensor:
        return self.results[: self.size * self.width]


@dataclass(slots=True)
class Layout:
    """Who is where in a step."""

    handles: list[RowHandle] = field(default_factory=list)
    """By row of the batch."""
    decode: list[int] = field(default_factory=list)
    """Rows of one token and its drafts, in the batch's order."""
    chunks: list[int] = field(default_factory=list)
    size: int = 0
    """Of the decode rows, padded."""
    width: int = 1
    """Tokens of a decode row, padded."""
    wanted: list[int] = field(default_factory=list)
    """Row of the batch for each row of logits; −1 = padding."""
    scratch: list[RowHandle] = field(default_factory=list)
    """Handles of rows that nothing is kept of."""
    of_prompts: dict[int, Told] = field(default_factory=dict)
    """As `DeviceStep.of_prompts`."""
    taps: Tensor | None = None
    """[T, taps · hidden], the decode rows' tokens first, then the chunks'; from the forward pass
    on."""
    first_of_chunks: int = 0
    """Where the chunks' tokens begin in `taps`: decode rows may be padded."""
    are_taps_shared: bool = False
    """The next step writes its own to the same place."""


class WantedRows(NamedTuple):
    """Tokens whose logits are wanted, padding included."""

    tokens: Tensor
    """int32 [R]: which of the step's."""
    rows: Tensor
    """int32 [R]: their slots; −1 for padding."""
    back: Tensor | None
    """int32 [R]: tokens of the slot behind each; None where there are none."""
