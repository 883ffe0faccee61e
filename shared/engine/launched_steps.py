"""Steps with prompt chunks, launched kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from baton.kernels.decode_attention import DecodeWork, plan_decode
from baton.kernels.state_plan import DeviceStatePlan
from baton.shared.engine.batch import Batch
from baton.shared.engine.decode_steps import DecodeSteps
from baton.shared.engine.device_columns import ChunkColumns, SentColumns, chunk_columns
from baton.shared.engine.device_context import DeviceContext, padded
from baton.shared.engine.device_logprobs import tell_of_prompt
from baton.shared.engine.device_plan import DevicePlan, GroupPlan, WidenedChunks
from baton.shared.engine.device_step import Layout, WantedRows
from baton.shared.engine.logprobs import rows_at_once


class LaunchedSteps:
    def __init__(self, context: DeviceContext, decode: DecodeSteps) -> None:
        """`decode`: whose buffers their decode rows have."""
        self._context = context
        self._decode = decode
        self.rows_at_once = rows_at_once(context.vocab_size)
        sizes = reversed(context.drawn_sizes)
        self.drawn_work = {size: context.make_work(size) for size in sizes}

    def compile_plans(self) -> None:
        """Those of wanted tokens that have drafts behind them; all others are met with decode."""
        context = self._context
        if len(context.widths) == 1:
            return
        for size, work in self.drawn_work.items():
            nobody = torch.full((size,), -1, dtype=torch.int32, device=context.device)
            back = torch.zeros_like(nobody)
            for each, window in zip(work, context.windows, strict=False):
                plan_decode(nobody, context.state.context_lens, each, back=back, window=window)

    def begin(
        self, batch: Batch, layout: Layout, num_wanted: Sequence[int]
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """As `DecodeSteps.begin`."""
        context = self._context
        hidden, columns, plans = self.compute(batch, layout, num_wanted)
        num_tokens = len(hidden)
        results = context.make_results(num_tokens, layout.size)
        if not num_tokens:
            return hidden, lambda: results
        undrawn = [self.head(hidden)]

        def draw() -> Tensor:
            num_guess_rows = layout.size * layout.width if layout.width > 1 else 0
            # Nobody has them behind the draw: there may be as many again.
            logits = undrawn.pop()
            context.draw.draw(
                logits, columns.rows, columns.back, results[:num_tokens], num_guess_rows
            )
            del logits
            if layout.width > 1:
                rows = context.state.rows[layout.size]
                context.draw.accept(rows, results, num_tokens, plans)
            return results

        return hidden, draw

    def head(self, hidden: Tensor) -> Tensor:
        """[R, hidden] → logits [R, vocab]."""
        if not len(hidden):
            return hidden.new_empty(0, self._context.vocab_size)
        return self._context.model.logits(hidden)

    def compute(
        self, batch: Batch, layout: Layout, num_wanted: Sequence[int]
    ) -> tuple[Tensor, WantedRows, Sequence[GroupPlan]]:
        """Runs a step with prompt chunks; of each row the logits at its last `num_wanted` tokens
        are wanted.

        Returns [R, hidden] of what is wanted, and of padding, for the head, what they are of, and
        the step's plans; `layout.wanted` says which rows.
        """
        context = self._context
        columns, has_back = self._pack(batch, layout, num_wanted)
        packed = context.host.send(context.state, columns.packed)
        assert packed is not None
        sent = columns.unpack(packed)
        wanted = WantedRows(sent.wanted, sent.rows, sent.back if has_back else None)
        plans = self._plan(layout, columns, sent)
        if layout.size:
            buffers = self._decode.buffers[layout.size, layout.width]
            here = replace(buffers, positions=sent.positions, slots=sent.slots)
            context.begin_rows(sent.input_ids, here, plans)
        asks = any(batch.rows[i].prompt_logprobs is not None for i in layout.chunks)
        inputs = self._inputs(batch, layout, len(sent.input_ids))
        all_go = asks or context.tapped is not None and context.tapped.to_the_end
        if all_go or columns.num_wanted > context.drawn_sizes[-1]:
            # More are wanted than ever draw at once: all tokens go through the last layer.
            hidden = context.model.hidden_states(
                sent.input_ids, sent.positions, context.caches, plans, **inputs
            )
            if asks:
                self._tell_of_prompts(batch, layout, hidden)
            hidden = hidden.index_select(0, wanted.tokens)
        else:
            hidden = context.model.hidden_states(
                sent.input_ids,
                sent.positions,
                context.caches,
                plans,
                (wanted.tokens, self._plans_of(wanted, plans)),
                **inputs,
            )
        return hidden, wanted, plans

    def _inputs(self, batch: Batch, layout: Layout, num_tokens: int) -> dict[str, Any]:
        """What the model gets beside so many tokens, and fills; notes where it tells of them."""
        inputs = self._context.make_inputs(num_tokens)
        if "taps" in inputs:
            layout.taps = inputs["taps"].out.flatten(1)
            layout.first_of_chunks = layout.size * layout.width
        if "features" in inputs:
            starts = [*range(len(layout.decode))]
            token = layout.size * layout.width
            for i in layout.chunks:
                starts.append(token)
                token += batch.rows[i].num_tokens
            for start, i in zip(starts, [*layout.decode, *layout.chunks], strict=True):
                features = batch.rows[i].features
                if features is not None:
                    inputs["features"][start : start + len(features)].copy_(features)
        return inputs

    def _tell_of_prompts(self, batch: Batch, layout: Layout, hidden: Tensor) -> None:
        """hidden: [T, hidden], of all of the step's tokens."""
        context = self._context
        token = layout.size * layout.width
        for i in layout.chunks:
            row = batch.rows[i]
            wanted = row.prompt_logprobs
            if wanted is not None:
                layout.of_prompts[i] = tell_of_prompt(
                    hidden,
                    token + wanted.first,
                    wanted.token_ids,
                    wanted.num_top,
                    context.model.logits,
                    most=self.rows_at_once,
                    padded=self._padded_head,
                )
            token += row.num_tokens

    def _pack(
        self, batch: Batch, layout: Layout, num_wanted: Sequence[int]
    ) -> tuple[ChunkColumns, bool]:
        """The step's columns, and whether a wanted token has others of its slot behind it."""
        context = self._context
        places = self._place_wanted(batch, layout, num_wanted)
        num_padded = len(places)
        if 0 < num_padded <= context.drawn_sizes[-1]:
            # As many rows of logits as decode has in one of its graphs: those are compiled.
            num_padded = padded(num_padded, context.drawn_sizes)
        layout.wanted += [-1] * (num_padded - len(places))
        columns = chunk_columns(
            layout.size * layout.width,
            [(layout.handles[i].slot, batch.rows[i]) for i in layout.chunks],
            places,
            num_padded,
            num_groups=len(context.caches),
            num_slot_groups=context.num_slot_groups,
            block_size=context.block_size,
            head_dim=max((kv.shape[5] for kv in context.kv), default=1),
            itemsize=context.dtype.itemsize,
            by_chunk=any(context.are_latents),
            most_widened=0 if context.widened is None else context.widened.num_stretches,
        )
        return columns, any(behind for _, _, behind in places)

    def _plan(self, layout: Layout, columns: ChunkColumns, sent: SentColumns) -> list[GroupPlan]:
        """By cache group: where a step's tokens are stored and what they attend to, or where the
        states of its rows are."""
        context = self._context
        rows: Tensor | None = None
        work: Sequence[DecodeWork | None] = [None] * context.num_growing
        if layout.size:
            rows = self._decode.buffers[layout.size, layout.width].token_rows
            work = self._decode.work[layout.size, layout.width]
        attention = [
            DevicePlan(
                slots=sent.slots[group],
                context_lens=context.state.context_lens,
                block_tables=context.state.block_tables[group],
                rows=rows,
                work=work[group],
                block_m=columns.block_m,
                window=context.windows[group],
                **self._tiles(columns, sent, group),
                **self._of_chunks(columns, group),
            )
            for group in range(context.num_growing)
        ]
        states = [
            DeviceStatePlan(
                slots=sent.slots[context.num_growing + number],
                positions=sent.positions,
                num_singles=layout.size * layout.width,
                rows=of_rows,
                tiles=tiles,
                num_padding=columns.num_padding,
                has_kept=columns.keeps_states,
                width=layout.width,
            )
            for number, (of_rows, tiles) in enumerate(sent.states)
        ]
        return [*attention, *states]

    def _tiles(self, columns: ChunkColumns, sent: SentColumns, group: int) -> dict[str, Any]:
        widened = self._context.widened
        kv = None if widened is None else widened.kv[group]
        if widened is None or kv is None or not sent.widened:
            return {"tiles": sent.tiles if columns.num_tiles else None}
        return {
            "tiles": None,
            "widened": tuple(
                WidenedChunks(kv, widened.block_tables, seen, tiles=tiles)
                for tiles, seen in sent.widened
            ),
        }

    def _of_chunks(self, columns: ChunkColumns, group: int) -> dict[str, Any]:
        """What a plan says of chunks and padding."""
        context = self._context
        if not context.are_latents[group]:
            return {"attended": self._attended(columns, group) if columns.num_padding else None}
        return {
            "chunks": columns.chunks,
            "num_padding": columns.num_padding,
            "counting": context.counting,
        }

    def _place_wanted(
        self, batch: Batch, layout: Layout, num_wanted: Sequence[int]
    ) -> list[tuple[int, int, int]]:
        """(token of the step, slot, tokens of the slot behind it) of each row of logits; notes in
        `layout.wanted` which rows they are of."""
        rows, handles, width = batch.rows, layout.handles, layout.width
        places: list[tuple[int, int, int]] = []
        for place, i in enumerate(layout.decode):
            num_drafts = len(rows[i].draft_ids)
            for j in range(1 + num_drafts):
                # Drafts are checked at every token of a row, whatever else is wanted of it.
                if width > 1 or j >= 1 + num_drafts - num_wanted[i] or not num_wanted[i]:
                    places.append((place * width + j, handles[i].slot, num_drafts - j))
                    layout.wanted.append(i)
            if width > 1:
                # In the places that `accept_drafts` looks at.
                padding = width - 1 - num_drafts
                places += [(place * width, -1, 0)] * padding
                layout.wanted += [-1] * padding
        if width > 1:
            padding = (layout.size - len(layout.decode)) * width
            places += [(0, -1, 0)] * padding
            layout.wanted += [-1] * padding
        token = layout.size * width
        for i in layout.chunks:
            token += rows[i].num_tokens
            for before in range(num_wanted[i], 0, -1):
                places.append((token - before, handles[i].slot, before - 1))
                layout.wanted.append(i)
        return places

    def _plans_of(self, wanted: WantedRows, plans: Sequence[GroupPlan]) -> list[GroupPlan]:
        """What the wanted tokens attend to: as in a decode step, the slot's keys up to them. States
        have changed by then, and are not asked for."""
        context = self._context
        num_rows = len(wanted.rows)
        drawn: list[DevicePlan] = []
        attention = [plan for plan in plans if isinstance(plan, DevicePlan)]
        for group, plan in enumerate(attention):
            work = self.drawn_work[num_rows][group] if num_rows else None
            context.plan_work(wanted.rows, work, wanted.back, drawn)
            alone = replace(plan, rows=wanted.rows, work=work, tiles=None, attended=None)
            drawn.append(replace(alone, widened=(), chunks=(), num_padding=0))
        return [*drawn, *plans[len(drawn) :]]

    def _attended(self, columns: ChunkColumns, group: int) -> Tensor:
        """Nobody reads what becomes of the padding, but numbers shall go on through the layers."""
        context = self._context
        attended = torch.empty(
            columns.num_tokens,
            context.num_heads,
            context.kv[group].shape[5],
            dtype=context.dtype,
            device=context.device,
        )
        attended[-columns.num_padding :].zero_()
        return attended

    def _padded_head(self, num_rows: int) -> int:
        sizes = self._context.drawn_sizes
        return padded(num_rows, sizes) if num_rows <= sizes[-1] else num_rows
