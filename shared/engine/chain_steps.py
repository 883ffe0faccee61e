"""Chains of guesses on the device: k steps of a model that guesses, of which the host knows nothing
until the last is over.

    first   known tokens of each row ─► begin ─► layers ─► the last token's logits ─► draw ─► guess
    then    the guess ─► begin ─► layers ─► logits ─► draw ─► the next, of rows that want as many

Each step is a CUDA graph for each padded number of rows, the first one also for how many tokens a
row may begin with. What varies lies in the batch's state: slots, lengths, tokens, who takes part in
which step. A head's steps hand on what the head made of each row's last token; the first takes the
larger model's hidden states.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch
from torch import Tensor

from baton.kernels.decode_attention import DecodeWork
from baton.kernels.decode_plan import Scratch
from baton.shared.engine.batch import ChainRow
from baton.shared.engine.batch_state import aligned
from baton.shared.engine.decode_steps import make_buffers
from baton.shared.engine.device_context import DeviceContext, padded
from baton.shared.engine.device_step import DecodeBuffers
from baton.shared.engine.executor import ChainShape, HeadModel
from baton.shared.engine.graphs import Graph, Graphs
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)

_FEW_KNOWN = 2
"""Tokens of rows whose guesses all stood: the last guess was not computed, nor what was drawn
behind it."""


def widths_of(shape: ChainShape) -> list[int]:
    """Tokens of a row that first steps are made for."""
    return sorted({min(_FEW_KNOWN, shape.most_known), shape.most_known})


def rows_at(place: int, slots: Sequence[int], num_guesses: Sequence[int]) -> list[int]:
    """By row of a chain the slot, in its step `place`: −1 for one that wants no more guesses."""
    return [slot if place < num else -1 for slot, num in zip(slots, num_guesses, strict=True)]


@dataclass(slots=True)
class _Chain:
    """Of one padded number of rows."""

    size: int
    rows: list[Tensor]
    """By step, int32 [size]: the slots that take part."""
    first: dict[int, DecodeBuffers]
    """By tokens of a row."""
    later: list[DecodeBuffers]
    """The first of them is the chain's second step."""
    tokens: list[Tensor]
    """By step, int32 [size]."""
    graphs_first: dict[int, Graph] = field(default_factory=dict)
    graphs_later: list[Graph] = field(default_factory=list)


class ChainSteps:
    def __init__(
        self,
        context: DeviceContext,
        shape: ChainShape,
        work: Mapping[tuple[int, int], list[DecodeWork]],
    ) -> None:
        """`work`: for rows of one token, by padded number of rows and 1."""
        self._context = context
        self._shape = shape
        self._widths = widths_of(shape)
        most_rows = context.sizes[-1]
        self._results = torch.zeros(
            shape.num_guesses, aligned(most_rows), dtype=torch.int32, device=context.device
        )
        self._states = torch.zeros(
            most_rows * shape.most_known,
            shape.state_size,
            dtype=context.dtype,
            device=context.device,
        )
        """What comes with the first step's tokens, of which each row has as many places."""
        self._nothing = self._states.new_zeros(shape.most_known, shape.state_size)
        self._numbers = torch.arange(most_rows, dtype=torch.int32, device=context.device)
        scratch = Scratch()
        shapes = sorted(product(context.sizes, self._widths), key=lambda each: -each[0] * each[1])
        work = {
            **work,
            **{each: context.make_work(*each, scratch=scratch) for each in shapes},
        }
        self._chains = {size: self._make_chain(size, work) for size in context.sizes}

    def check(self, chain: ChainRow) -> None:
        """Raises ValueError for a chain that no steps were made for."""
        shape = self._shape
        if not 0 < chain.num_guesses <= shape.num_guesses:
            most = shape.num_guesses
            raise ValueError(f"a chain of {chain.num_guesses} guesses, not 1 to {most}")
        if chain.row.num_tokens > shape.most_known:
            raise ValueError(f"a chain may begin with {shape.most_known} tokens at most")

    def launch(self, chains: Sequence[ChainRow], slots: Sequence[int]) -> Tensor:
        """Begins chains of rows in these slots, of which the state has been told → int32 [steps,
        stride], where the guesses will be until the next launch."""
        context, state = self._context, self._context.state
        num_guesses = [chain.num_guesses for chain in chains]
        width = padded(max(chain.row.num_tokens for chain in chains), self._widths)
        of_size = self._chains[padded(len(chains), context.sizes)]
        state.send_rows(of_size.size, [*slots])
        num_steps = max(num_guesses)
        for place in range(1, num_steps):
            state.send_later_rows(of_size.size, place, rows_at(place, slots, num_guesses))
        context.host.send(state, None)
        if self._shape.state_size:
            self._gather_states(chains, width)
        if width in of_size.graphs_first:
            of_size.graphs_first[width].replay()
        else:
            self._first(of_size, width)
        for place in range(1, num_steps):
            if of_size.graphs_later:
                of_size.graphs_later[place - 1].replay()
            else:
                self._later(of_size, place)
        return self._results[:num_steps]

    def _gather_states(self, chains: Sequence[ChainRow], width: int) -> None:
        """Row by row, each padded to `width` tokens."""
        parts: list[Tensor] = []
        for chain in chains:
            parts += chain.states
            if (num_missing := width - chain.row.num_tokens) > 0:
                parts.append(self._nothing[:num_missing])
        torch.cat(parts, out=self._states[: len(chains) * width])

    def capture(self, graphs: Graphs | None) -> None:
        """Compiles the kernels; where there is what captures, makes graphs for all padded numbers
        of rows that there is memory for."""
        started_s = time.monotonic()
        refused = []
        # The largest first: the smaller ones find room in its memory.
        for of_size in reversed(self._chains.values()):
            if graphs is None:
                self._launch_all(of_size)
            elif not self._capture(of_size, graphs):
                refused.append(of_size.size)
                # So that nothing is compiled when they are launched; as far as there is memory.
                with suppress(torch.OutOfMemoryError):
                    self._launch_all(of_size)
        if graphs is not None:
            self._log(graphs, refused, time.monotonic() - started_s)

    def _capture(self, of_size: _Chain, graphs: Graphs) -> bool:
        """Whether there was memory; else nothing of that size is captured."""
        first: dict[int, Graph] = {}
        later: list[Graph] = []
        for width in reversed(self._widths):
            graph = graphs.capture_if_room(partial(self._first, of_size, width))
            if graph is None:
                return False
            first[width] = graph
        for place in range(1, self._shape.num_guesses):
            graph = graphs.capture_if_room(partial(self._later, of_size, place))
            if graph is None:
                return False
            later.append(graph)
        of_size.graphs_first, of_size.graphs_later = first, later
        return True

    def _launch_all(self, of_size: _Chain) -> None:
        for width in self._widths:
            self._first(of_size, width)
        for place in range(1, self._shape.num_guesses):
            self._later(of_size, place)

    def _log(self, graphs: Graphs, refused: Sequence[int], seconds: float) -> None:
        log_event(
            logger,
            logging.INFO,
            "chains of guesses are captured as CUDA graphs",
            num_guesses=self._shape.num_guesses,
            sizes=" ".join(str(size) for size in self._chains if size not in refused),
            num_bytes=graphs.num_bytes,
            seconds=round(seconds, 2),
        )
        if refused:
            log_event(
                logger,
                logging.WARNING,
                "too little memory for CUDA graphs of chains of all sizes: others are launched "
                "kernel by kernel",
                missing=" ".join(str(size) for size in sorted(refused)),
            )

    # What is captured: fixed addresses only

    def _first(self, of_size: _Chain, width: int) -> None:
        context, model = self._context, self._context.model
        buffers = of_size.first[width]
        if isinstance(model, HeadModel):
            states = self._states[: len(buffers.input_ids)]
            buffers.inputs["features"].copy_(model.fuse(states))
        # What the first step of a chain computes is counted by the host.
        context.begin_rows(buffers.input_ids, buffers, buffers.plans, counts=False)
        hidden = self._hidden_states(buffers)
        # Of padding any token within its row.
        num_others = context.state.num_drafts.index_select(0, buffers.rows.clamp(min=0))
        last = self._numbers[: of_size.size] * width + num_others.clamp(max=width - 1)
        self._draw(of_size, 0, hidden.index_select(0, last))
        self._hand_on(of_size, buffers, last)

    def _later(self, of_size: _Chain, place: int) -> None:
        buffers = of_size.later[place - 1]
        self._context.begin_rows(buffers.input_ids, buffers, buffers.plans)
        self._draw(of_size, place, self._hidden_states(buffers))
        self._hand_on(of_size, buffers)

    def _hidden_states(self, buffers: DecodeBuffers) -> Tensor:
        context = self._context
        return context.model.hidden_states(
            buffers.input_ids, buffers.positions, context.caches, buffers.plans, **buffers.inputs
        )

    def _draw(self, of_size: _Chain, place: int, hidden: Tensor) -> None:
        """hidden: [size, hidden], of each row's last token."""
        context, rows = self._context, of_size.rows[place]
        logits = context.model.logits(hidden)
        context.draw.draw(logits, rows, None, of_size.tokens[place])

    def _hand_on(self, of_size: _Chain, buffers: DecodeBuffers, last: Tensor | None = None) -> None:
        """Of a head: what it made of the rows' last tokens comes with their next ones."""
        if "taps" not in buffers.inputs:
            return
        made = buffers.inputs["taps"].out.flatten(1)
        features = buffers.inputs["features"][: of_size.size]
        features.copy_(made if last is None else made.index_select(0, last))

    def _make_chain(self, size: int, work: Mapping[tuple[int, int], list[DecodeWork]]) -> _Chain:
        context = self._context
        rows = [context.state.rows[size], *context.state.later_rows[size]]
        return _Chain(
            size,
            rows,
            {
                width: make_buffers(context, size, width, work[size, width])
                for width in self._widths
            },
            [make_buffers(context, size, 1, work[size, 1], each) for each in rows[1:]],
            [of_step[:size] for of_step in self._results],
        )
