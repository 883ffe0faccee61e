"""Steps with prompt chunks from CUDA graphs, whatever the number and lengths of chunks and of the
decode rows beside them.

    columns (prompt_columns.py) ─► begin ─► layers ─► the wanted tokens ─► rest ─► logits ─► draw
                                   └─ a graph by tokens and decode rows ─┘ └ by wanted ┘ └ by wanted

A graph has a grid, and buffers, for the most that its size may hold; what there is to do stands in
lists on the device. Its tokens are padded: padding is stored nowhere and attended to by nobody. A
step that no graph is for is launched kernel by kernel (launched_steps.py).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from baton.kernels.batch_state import begin_step, scatter
from baton.kernels.decode_attention import DecodeWork, plan_decode
from baton.kernels.float8_jit import is_float8
from baton.kernels.latent_expand import STRETCH_TOKENS
from baton.kernels.prefill_attention import block_m_for, is_wide
from baton.kernels.split_prefill_attention import ItemConfig, ItemWork, item_config, make_item_work
from baton.kernels.state_plan import DeviceStatePlan
from baton.shared.engine.batch import Batch
from baton.shared.engine.batch_state import aligned
from baton.shared.engine.device_columns import WIDE_TOKENS
from baton.shared.engine.device_context import DeviceContext, padded
from baton.shared.engine.device_plan import ChunkItems, DevicePlan, Expansion, WidenedChunks
from baton.shared.engine.device_step import Layout
from baton.shared.engine.executor import Halfway, HalvesModel, Taps
from baton.shared.engine.graphs import Graph, Graphs
from baton.shared.engine.prompt_columns import (
    MOST_UPDATES,
    ItemKind,
    PromptLayout,
    PromptViews,
    Stretches,
)
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)

SIZES = (16, 32, 64, 128, 192, 256, 384, 512, 576, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
"""Tokens of a step, padded: where a step is as long as its products, not as its weights, tiles of
128 tokens take as long as they do full."""
_FEW_DECODE_ROWS = 64
_ITEMS_ONLY = 256
"""In steps of so many tokens all chunks are cut into items: there are fewer tiles than a GPU has
processors."""
_FEWEST_TOKENS_EACH, _MOST_STATE_ROWS, _LEAST_STATE_ROWS = 16, 32, 4
"""Of chunks of models whose layers keep states, in a step: so many tokens on average. Each chunk
begins a tile, with its state before it, and there are programs for all that there may be."""
EXPANDED_TOKENS = 16384
"""Of chunks that attend to keys and values made of latents, with what is before them: so many are
made at once, of at most 16 heads. That takes 192 MiB of deepseek's."""
_FEW_HEADS = 32
"""Of latents: of so many heads launched steps expand few tokens behind many, too, for what absorbs
has too few programs then (`expands`)."""
_WIDE_HEAD = 256
"""As if a head that is made of latents had so many numbers: then tiles are those of all sizes."""
_FIRST_LAYERS = 8
"""One part in so many of the layers is a graph of its own: a GPU takes about as long for it as the
launch of the others does."""


def sizes_up_to(most_tokens: int) -> list[int]:
    """Those for steps of so many tokens at most, as far as any are for them."""
    return [
        size for size, before in zip(SIZES, (0, *SIZES[:-1]), strict=True) if before < most_tokens
    ]


@dataclass(slots=True)
class _Step:
    """Of one padded number of tokens, and of decode rows at most."""

    layout: PromptLayout
    views: PromptViews
    num_decode: int
    plans: list[DevicePlan]
    """By group of keys and values."""
    head_dims: list[int]
    """Likewise."""
    states: list[DeviceStatePlan]
    """By group of states."""
    graph: Graph | None = None


@dataclass(slots=True)
class _Rest:
    """Of one padded number of wanted tokens: what is left of the layers, the logits, the draw."""

    rows: Tensor
    results: Tensor
    plans: list[DevicePlan]
    states: list[DeviceStatePlan]
    """Of tokens whose states have changed before."""
    hidden: Tensor | None = None
    logits: Tensor | None = None
    graphs: tuple[Graph, Graph] | None = None


class PromptSteps:
    def __init__(
        self,
        context: DeviceContext,
        model: HalvesModel,
        work: Mapping[int, list[DecodeWork]],
    ) -> None:
        """`work`: for attention of so many tokens that are wanted, by cache group."""
        self._context = context
        self._model = model
        self._most_rows = max_num_seqs = context.sizes[-1]
        self._item_work: dict[tuple[ItemConfig, int], ItemWork] = {}
        self._decode_work = dict(work)
        self._steps: dict[tuple[int, int], _Step] = {}
        """By tokens and decode rows."""
        self._rest: dict[int, _Rest] = {}
        self._arena = torch.zeros(0, dtype=torch.int32, device=context.device)
        self._counting = self._arena
        self._halfway: Halfway | None = None
        """Of the wanted tokens, [max_num_seqs, …] each."""
        self._taps: Taps | None = None
        """Of the largest step's tokens."""
        self._results = context.make_results(max_num_seqs, 0)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(tokens, decode rows) that there are graphs for."""
        return list(self._steps)

    def begin(
        self, batch: Batch, layout: Layout, num_wanted: Sequence[int]
    ) -> tuple[Tensor, Callable[[], Tensor]] | None:
        """As `DecodeSteps.begin`; None: no graph is for such a step, and nothing was done."""
        step = self._step_for(batch, layout)
        if step is None:
            return None
        context, rows = self._context, batch.rows
        wanted: list[tuple[int, int]] = []
        for place, row in enumerate(layout.decode):
            if num_wanted[row]:
                wanted.append((place, layout.handles[row].slot))
                layout.wanted.append(row)
        token = len(layout.decode)
        for row in layout.chunks:
            token += rows[row].num_tokens
            if num_wanted[row]:
                wanted.append((token - 1, layout.handles[row].slot))
                layout.wanted.append(row)
        # Where they are few, as of most steps, they go along and are written by the graph.
        goes_along = context.state.num_updates <= MOST_UPDATES
        packed = step.layout.pack(
            [layout.handles[row].slot for row in layout.decode],
            [(layout.handles[row].slot, rows[row]) for row in layout.chunks],
            wanted,
            context.block_size,
            context.state.take_updates() if goes_along else None,
        )
        context.host.send_to(self._arena, context.state, packed)
        assert self._halfway is not None
        if self._taps is not None:
            layout.taps, layout.are_taps_shared = self._taps.out.flatten(1), True
            layout.first_of_chunks = len(layout.decode)
        _run(step.graph, partial(self._forward, step))
        if not wanted:
            none = self._results[:0]
            return self._halfway.hidden[:0], lambda: none
        rest = self._rest[padded(len(wanted), list(self._rest))]
        layout.wanted += [-1] * (len(rest.rows) - len(wanted))
        _run(rest.graphs and rest.graphs[0], partial(self._finish, rest))
        assert rest.hidden is not None

        def draw() -> Tensor:
            _run(rest.graphs and rest.graphs[1], partial(self._draw, rest))
            return rest.results

        return rest.hidden, draw

    def _step_for(self, batch: Batch, layout: Layout) -> _Step | None:
        chunks = [batch.rows[row] for row in layout.chunks]
        if layout.width > 1 or any(row.prompt_logprobs is not None for row in chunks):
            return None
        num_tokens, num_decode = batch.num_tokens, len(layout.decode)
        for (most_tokens, most_decode), step in self._steps.items():
            is_large = most_tokens >= num_tokens and most_decode >= num_decode
            if is_large and step.layout.takes(chunks):
                return step
        return None

    def capture(self, graphs: Graphs, sizes: Sequence[int]) -> None:
        """Makes a graph for every size, without decode rows beside chunks, with a few, and with as
        many as there may be; of those that there is memory for."""
        started_s = time.monotonic()
        context = self._context
        most = (0, min(_FEW_DECODE_ROWS, self._most_rows), self._most_rows)
        shapes = sorted({(size, min(rows, size)) for size, rows in product(sizes, most)})
        layouts = {size: self._layout(size) for size in sizes}
        num_words = max((layout.num_words for layout in layouts.values()), default=0)
        self._arena = torch.zeros(aligned(num_words), dtype=torch.int32, device=context.device)
        if context.tapped is not None:
            self._taps = context.tapped.make(max(sizes, default=0), context.device)
        refused = []
        # The largest first: the smaller ones find room in its memory.
        for size, num_decode in reversed(shapes):
            step = self._make_step(layouts[size], num_decode)
            nothing = step.layout.pack([], [], [], context.block_size)
            self._arena[: len(nothing)].copy_(torch.from_numpy(nothing))
            graph = graphs.capture_if_room(partial(self._forward, step, graphs.cut))
            if graph is None:
                refused.append((size, num_decode))
                continue
            step.graph = graph
            self._steps[size, num_decode] = step
        for size in reversed(context.sizes if self._steps else []):
            rest = self._make_rest(size)
            self._finish(rest)
            self._draw(rest)
            first = graphs.capture(partial(self._finish, rest))
            rest.graphs = first, graphs.capture(partial(self._draw, rest))
            self._rest[size] = rest
        # The smallest that fits is taken.
        self._steps = dict(sorted(self._steps.items()))
        self._rest = dict(sorted(self._rest.items()))
        self._log(refused, graphs.num_bytes, time.monotonic() - started_s)

    def _log(self, refused: Sequence[tuple[int, int]], num_bytes: int, seconds: float) -> None:
        shown = " ".join(f"{size}+{rows}" if rows else f"{size}" for size, rows in self.sizes)
        log_event(
            logger,
            logging.INFO,
            "prompt steps are captured as CUDA graphs",
            sizes=shown,
            num_bytes=num_bytes,
            seconds=round(seconds, 2),
        )
        if refused:
            log_event(
                logger,
                logging.WARNING,
                "too little memory for CUDA graphs of all sizes of prompt steps: others are "
                "launched kernel by kernel",
                missing=" ".join(f"{size}+{rows}" for size, rows in sorted(refused)),
            )

    # What is captured: fixed addresses only

    def _forward(self, step: _Step, cut: Callable[[], None] = lambda: None) -> None:
        """`cut`: called where what is captured is to be cut in two."""
        context, views, state = self._context, step.views, self._context.state
        plans = step.plans
        scatter(state.arena, views.updates)
        if step.num_decode:
            decode = views.decode[: step.num_decode]
            begin_step(
                decode,
                state.token_ids,
                state.context_lens,
                state.block_tables,
                views.input_ids,
                views.positions,
                views.slots,
                block_size=context.block_size,
                num_slot_groups=context.num_slot_groups,
                counting=state.shaping.counting,
                leaves_padding=True,
            )
            for number, plan in enumerate(plans):
                if any(plan.work is before.work for before in plans[:number]):
                    continue
                assert plan.work is not None
                plan_decode(
                    decode,
                    state.context_lens,
                    plan.work,
                    window=plan.window,
                    # To what is made of latents, that of rows is added: of padding, zeros.
                    leaves_padding=not context.are_latents[number],
                )
        # Nobody reads what becomes of the padding, but numbers shall go on through the layers.
        attended = {
            head_dim: torch.zeros(
                step.layout.num_tokens,
                context.num_heads,
                head_dim,
                dtype=context.dtype,
                device=context.device,
            )
            for plan, head_dim in zip(plans, step.head_dims, strict=True)
            if plan.expansion is None
        }
        plans = [
            replace(plan, attended=attended[head_dim])
            if plan.expansion is None
            else replace(plan, expansion=plan.expansion._replace(attended={}))
            for plan, head_dim in zip(plans, step.head_dims, strict=True)
        ]
        states = [replace(plan, shared={}) for plan in step.states]

        def between(num_done: int, num_layers: int) -> None:
            if num_done == max(num_layers // _FIRST_LAYERS, 1):
                cut()

        taps = self._taps and self._taps._replace(out=self._taps.out[: step.layout.num_tokens])
        halfway = self._model.begin(
            views.input_ids,
            views.positions,
            context.caches,
            [*plans, *states],
            between,
            taps=taps,
        )
        if self._halfway is None:
            self._halfway = _like(halfway, self._most_rows)
        for whole, own in zip(halfway, self._halfway, strict=True):
            if whole is not None and own is not None:
                torch.index_select(whole, 0, views.wanted, out=own)

    def _finish(self, rest: _Rest) -> None:
        assert self._halfway is not None
        for number, plan in enumerate(rest.plans):
            self._context.plan_work(rest.rows, plan.work, None, rest.plans[:number])
        num_rows = len(rest.rows)
        halfway = Halfway(*(_first(each, num_rows) for each in self._halfway))  # type: ignore[arg-type]
        # Attention comes first, and may begin while the kernel before it still runs: that must not
        # be the one that plans it.
        halfway = halfway._replace(query=halfway.query.clone())
        plans = [*rest.plans, *rest.states]
        rest.hidden = self._model.finish(halfway, self._context.caches, plans)
        rest.logits = self._model.logits(rest.hidden)

    def _draw(self, rest: _Rest) -> None:
        logits, rest.logits = rest.logits, None
        assert logits is not None
        self._context.draw.draw(logits, rest.rows, None, rest.results)

    # Buffers

    def _layout(self, num_tokens: int) -> PromptLayout:
        context = self._context
        kinds = dict.fromkeys(
            self._kind(num_tokens, group)
            for group in self._groups
            if not context.are_latents[group]
        )
        # A chunk has two tokens at least.
        most_rows, most_kept = num_tokens // 2, 0
        if context.num_slot_groups:
            most_rows = max(num_tokens // _FEWEST_TOKENS_EACH, _LEAST_STATE_ROWS)
            most_kept = most_rows = min(most_rows, _MOST_STATE_ROWS)
        return PromptLayout(
            num_tokens=num_tokens,
            num_groups=len(context.caches),
            most_wanted=self._most_rows,
            most_decode=self._most_rows,
            most_rows=min(self._most_rows, most_rows),
            kinds=tuple(kinds),
            num_slot_groups=context.num_slot_groups,
            most_kept=most_kept,
            stretches=self._stretches(num_tokens),
            most_widened=0 if context.widened is None else context.widened.num_stretches,
        )

    def _stretches(self, num_tokens: int) -> Stretches | None:
        """Of a step of so many tokens."""
        context = self._context
        if not any(context.are_latents):
            return None
        of_each = math.lcm(STRETCH_TOKENS, context.block_size)
        block_m = block_m_for(num_tokens, _WIDE_HEAD, context.dtype.itemsize)
        most = max(EXPANDED_TOKENS // of_each, 1)
        return Stretches(of_each, most, block_m, takes_few=context.num_heads <= _FEW_HEADS)

    @property
    def _groups(self) -> range:
        return range(len(self._context.kv))

    def _kind(self, num_tokens: int, group: int) -> ItemKind:
        work, window = self._work_of(group), self._context.windows[group]
        has_wide = num_tokens > _ITEMS_ONLY and self._is_wide(group)
        config = work.config
        is_widened = self._room_of(group) is not None
        return ItemKind(
            config.block_m, config.block_n, work.most_cuts, window, has_wide, is_widened
        )

    def _is_wide(self, group: int) -> bool:
        context = self._context
        if context.widened is not None:
            # Tiles name places of what is widened, and no slots, for all groups.
            return self._room_of(group) is not None
        return is_wide(context.kv[group], context.windows[group], context.dtype.itemsize)

    def _room_of(self, group: int) -> Tensor | None:
        """Where what the group's chunks see is widened."""
        widened = self._context.widened
        return None if widened is None else widened.kv[group]

    def _work_of(self, group: int) -> ItemWork:
        context, kv = self._context, self._context.kv[group]
        _, num_kv_heads, _, _, _, head_dim = kv.shape
        config = item_config(
            context.num_heads,
            num_kv_heads,
            head_dim,
            context.dtype.itemsize,
            context.device,
            is_float8=is_float8(kv) and self._room_of(group) is None,
        )
        key = (config, head_dim)
        if key not in self._item_work:
            self._item_work[key] = make_item_work(
                config, context.num_heads, head_dim, context.device
            )
        return self._item_work[key]

    def _make_step(self, layout: PromptLayout, num_decode: int) -> _Step:
        context = self._context
        views = layout.views(self._arena)
        if num_decode and num_decode not in self._decode_work:
            self._decode_work[num_decode] = context.make_work(num_decode)
        plans = []
        for group in self._groups:
            if context.are_latents[group]:
                plans.append(self._plan_of_latents(layout, views, num_decode, group))
                continue
            plans.append(
                DevicePlan(
                    slots=views.slots[group],
                    context_lens=context.state.context_lens,
                    block_tables=context.state.block_tables[group],
                    rows=views.decode[:num_decode] if num_decode else None,
                    work=self._decode_work[num_decode][group] if num_decode else None,
                    block_m=WIDE_TOKENS,
                    window=context.windows[group],
                    **self._chunks(layout, views, group),
                )
            )
        states = [
            DeviceStatePlan(of_group, views.positions, num_decode, rows, tiles, has_kept=True)
            for of_group, (rows, tiles) in zip(
                views.slots[context.num_growing :], views.states, strict=True
            )
        ]
        head_dims = [kv.shape[5] for kv in context.kv]
        return _Step(layout, views, num_decode, plans, head_dims, states)

    def _chunks(self, layout: PromptLayout, views: PromptViews, group: int) -> dict[str, Any]:
        """What a plan says of chunks, that of latents aside."""
        kind = self._kind(layout.num_tokens, group)
        number = layout.kinds.index(kind)
        num_items = views.counts[2 + number :][:1]
        lists: dict[str, Any] = {
            "tiles": views.tiles if kind.has_wide else None,
            "num_tiles": views.counts[:1],
            "items": ChunkItems(views.items[number], num_items, self._work_of(group)),
        }
        widened, kv = self._context.widened, self._room_of(group)
        if widened is None or kv is None:
            return lists
        tables, num_stretches = widened.block_tables, views.counts[1:2]
        chunks = WidenedChunks(kv, tables, views.widened, num_stretches, **lists)
        return {"tiles": None, "widened": (chunks,)}

    def _plan_of_latents(
        self, layout: PromptLayout, views: PromptViews, num_decode: int, group: int
    ) -> DevicePlan:
        context, stretches = self._context, layout.stretches
        assert stretches is not None
        num_blocks = stretches.most * stretches.num_tokens // context.block_size
        if len(self._counting) < 2 * num_blocks:
            self._counting = torch.arange(2 * num_blocks, dtype=torch.int32, device=context.device)
        from_each = self._counting.as_strided((num_blocks, num_blocks), (1, 1))
        return DevicePlan(
            slots=views.slots[group],
            context_lens=context.state.context_lens,
            block_tables=context.state.block_tables[group],
            rows=views.decode[:num_decode] if num_decode else None,
            work=self._decode_work[num_decode][group] if num_decode else None,
            tiles=views.latent_tiles,
            block_m=stretches.block_m,
            expansion=Expansion(views.stretches, stretches.num_tokens, from_each, {}),
        )

    def _make_rest(self, num_rows: int) -> _Rest:
        context = self._context
        views = next(iter(self._steps.values())).views
        rows = views.rows[:num_rows]
        if num_rows not in self._decode_work:
            self._decode_work[num_rows] = context.make_work(num_rows)
        plans = [
            DevicePlan(
                slots=views.slots[group],
                context_lens=context.state.context_lens,
                block_tables=context.state.block_tables[group],
                rows=rows,
                work=self._decode_work[num_rows][group],
                tiles=None,
                block_m=0,
                window=context.windows[group],
            )
            for group in self._groups
        ]
        states = [
            DeviceStatePlan(of_group, views.positions, 0)
            for of_group in views.slots[context.num_growing :]
        ]
        return _Rest(rows, self._results[:num_rows], plans, states)


def _run(graph: Graph | None, launch: Callable[[], None]) -> None:
    if graph is None:
        launch()
    else:
        graph.replay()


def _like(halfway: Halfway, num_rows: int) -> Halfway:
    return Halfway(
        *(
            None if each is None else each.new_zeros(num_rows, *each.shape[1:])  # type: ignore[arg-type]
            for each in halfway
        )
    )


def _first(tensor: Tensor | None, num_rows: int) -> Tensor | None:
    return None if tensor is None else tensor[:num_rows]
