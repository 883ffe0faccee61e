"""Steps without prompt chunks: fixed buffers for every padded size, and CUDA graphs over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from baton.kernels.decode_attention import DecodeWork
from baton.kernels.state_plan import DeviceStatePlan
from baton.shared.engine.batch import Batch
from baton.shared.engine.device_context import DeviceContext
from baton.shared.engine.device_plan import DevicePlan, GroupPlan
from baton.shared.engine.device_step import DecodeBuffers, Layout
from baton.shared.engine.graphs import Graphs


class DecodeSteps:
    def __init__(self, context: DeviceContext) -> None:
        self._context = context
        shapes = [(size, width) for size in context.sizes for width in context.widths]
        self.work = {
            (size, width): context.make_work(size, width)
            for size, width in sorted(shapes, key=lambda shape: -shape[0] * shape[1])
        }
        self.buffers = {shape: make_buffers(context, *shape, self.work[shape]) for shape in shapes}
        """By padded size and width."""

    def begin(
        self, batch: Batch, layout: Layout, num_wanted: Sequence[int]
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """Launches the forward pass. The hidden states that tokens are drawn of, and what draws
        them, once, into its results."""
        buffers = self.buffers[layout.size, layout.width]
        layout.wanted = _wanted(layout, num_wanted)
        self._context.host.send(self._context.state, None)
        features = [batch.rows[i].features for i in layout.decode]
        fed = [each for each in features if each is not None]
        if fed:
            torch.cat(fed, out=buffers.inputs["features"][: len(fed)])
        if "taps" in buffers.inputs:
            layout.taps, layout.are_taps_shared = buffers.inputs["taps"].out.flatten(1), True
        if buffers.graphs is not None:
            buffers.graphs[0].replay()
        else:
            self._forward(buffers)
        assert buffers.hidden is not None

        def draw() -> Tensor:
            if buffers.graphs is not None:
                buffers.graphs[1].replay()
            else:
                self._draw(buffers)
            return buffers.results

        return buffers.hidden, draw

    def capture(self, graphs: Graphs | None) -> None:
        """Compiles the kernels; captures a graph for every padded size and width if there is what
        they are captured by."""
        # The largest first: the smaller ones find room in its memory.
        for buffers in sorted(
            self.buffers.values(), key=lambda each: each.size * each.width, reverse=True
        ):
            self._forward(buffers)
            self._draw(buffers)
            if graphs is None:
                continue
            forward = graphs.capture(partial(self._forward, buffers))
            buffers.graphs = forward, graphs.capture(partial(self._draw, buffers))

    def _forward(self, buffers: DecodeBuffers) -> None:
        """A step up to its logits; reads and writes fixed addresses only."""
        context = self._context
        for plan in buffers.plans:
            if isinstance(plan, DeviceStatePlan):
                # Of a step that did not draw.
                plan.noted.clear()
        context.begin_rows(buffers.input_ids, buffers, buffers.plans)
        buffers.hidden = context.model.hidden_states(
            buffers.input_ids, buffers.positions, context.caches, buffers.plans, **buffers.inputs
        )
        buffers.logits = context.model.logits(buffers.hidden)

    def _draw(self, buffers: DecodeBuffers) -> None:
        """The rest of it, likewise."""
        logits, buffers.logits = buffers.logits, None
        assert logits is not None
        self._context.draw.draw(
            logits,
            buffers.token_rows,
            buffers.back,
            buffers.tokens,
            buffers.size * buffers.width if buffers.width > 1 else 0,
        )
        if buffers.width > 1:
            num_tokens = buffers.size * buffers.width
            self._context.draw.accept(buffers.rows, buffers.results, num_tokens, buffers.plans)


def make_buffers(
    context: DeviceContext,
    size: int,
    width: int,
    work: Sequence[DecodeWork],
    rows: Tensor | None = None,
) -> DecodeBuffers:
    """`work`: by cache group that grows; `rows`: int32 [size], the slots that decode, where those
    are others than of all steps of that size."""
    state, num_tokens = context.state, size * width

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=context.device)

    if rows is None:
        rows = state.rows[size]
    slots = zeros(len(context.caches), num_tokens, dtype=torch.int64)
    token_rows = rows if width == 1 else zeros(num_tokens)
    positions = zeros(num_tokens)
    plans: list[GroupPlan] = [
        DevicePlan(
            slots=slots[group],
            context_lens=state.context_lens,
            block_tables=state.block_tables[group],
            rows=token_rows,
            work=of_group,
            tiles=None,
            block_m=0,
            window=context.windows[group],
        )
        for group, of_group in enumerate(work)
    ]
    plans += [
        DeviceStatePlan(of_group, positions, num_tokens, width=width)
        for of_group in slots[context.num_growing :]
    ]
    return DecodeBuffers(
        size,
        width,
        zeros(num_tokens),
        positions,
        slots,
        rows,
        token_rows,
        None if width == 1 else zeros(num_tokens),
        context.make_results(num_tokens, size),
        plans,
        context.decode_inputs(num_tokens),
    )


def _wanted(layout: Layout, num_wanted: Sequence[int]) -> list[int]:
    """Row of the batch for each token of the decode rows; −1 for padding."""
    width = layout.width
    wanted = [-1] * (layout.size * width)
    for place, row in enumerate(layout.decode):
        for j in range(max(1, num_wanted[row])):
            wanted[place * width + j] = row
    return wanted
