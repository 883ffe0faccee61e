"""Steps whose state stays on the device: Triton kernels, and CUDA graphs for decode.

    launch(batch)
      host    what changed of slots, block tables and rows      ─► updates    (batch_state.py)
              prompt chunks                                      ─► columns
      device  copy updates, scatter ─► begin_step ─► layers ─► logits ─► draw ─► tokens to the host
                                       └──────── one CUDA graph ───────┘ └ one ┘ per padded batch

Rows of one token may bring drafts along: then every row of the step has `width` tokens, K drafts
behind its own, and short rows are padded. There are graphs for that width too; what of the drafts
stands is found out on the device, and the host learns it with the tokens.

Nothing waits for the device: a decode row's token is where the step before left it, so step N + 1
can be launched while N runs. `DeviceStep.result` waits for the copy of the tokens.

A step may be begun without its draw (`begin`): masks depend on the token that step N draws, and are
made while N + 1 computes. Until it has drawn no other step begins.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from baton.kernels.batch_state import begin_step
from baton.kernels.decode_attention import DecodeWork, make_work, plan_decode
from baton.kernels.decode_plan import Scratch
from baton.kernels.drafts import accept_drafts, begin_drafted_step
from baton.kernels.latent_attention import latent_decode_config
from baton.kernels.logit_shaping import Guesses, shape_logits
from baton.kernels.sampling import draw, make_sampling_scratch
from baton.shared.engine.batch import Batch, BatchRow, RowHandle
from baton.shared.engine.batch_state import BatchState, aligned
from baton.shared.engine.device_columns import ChunkColumns, SentColumns, chunk_columns
from baton.shared.engine.device_logprobs import Told, asking, tell_of_drawn, tell_of_prompt
from baton.shared.engine.device_masks import DeviceMasks
from baton.shared.engine.device_step import (
    DecodeBuffers,
    DeviceBegun,
    DeviceStep,
    Layout,
    WantedRows,
)
from baton.shared.engine.executor import Model
from baton.shared.engine.host_buffers import HostBuffers
from baton.shared.engine.kv_cache import KvCache
from baton.shared.engine.logprobs import rows_at_once
from baton.shared.engine.shaping import History, Shaping
from baton.shared.engine.triton_operations import DevicePlan
from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.kv.cache_spec import Latent, window_of
from baton.shared.sampling import SamplingParams

_GREEDY = SamplingParams(temperature=0.0)


def padded_sizes(max_num_seqs: int) -> list[int]:
    """The sizes that decode batches are padded to; a few per cent are wasted at most from 16 up."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128]
    sizes += range(160, max(max_num_seqs, 160) + 32, 32)
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class DeviceExecutor:
    def __init__(
        self,
        model: Model,
        kv_cache: KvCache,
        device: torch.device,
        *,
        num_heads: int,
        vocab_size: int,
        max_model_len: int,
        max_num_seqs: int,
        num_drafts: int = 0,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        """`num_drafts`: the most that a row may bring along."""
        self.kv_cache = kv_cache
        self._model = model
        self._device = device
        self._num_heads = num_heads
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._block_size = kv_cache.block_size
        self._caches = kv_cache.padded_tensors
        self._num_blocks = [len(tensor) for tensor in kv_cache.tensors]
        self._windows = [window_of(group.spec) or 0 for group in kv_cache.groups]
        self._specs = [group.spec for group in kv_cache.groups]
        self._are_latents = [isinstance(spec, Latent) for spec in self._specs]
        self._sizes = padded_sizes(max_num_seqs)
        self._num_drafts = num_drafts
        self._widths = [1, 1 + num_drafts] if num_drafts else [1]
        # Sequences beyond those of one step may be waiting for their turn.
        num_slots = 2 * max_num_seqs + 16
        self._state = BatchState(
            num_slots,
            -(-max_model_len // self._block_size),
            self._sizes,
            device,
            zero_blocks=self._num_blocks,
            num_drafts=num_drafts,
            vocab_size=vocab_size,
        )
        width = self._state.block_tables[0].shape[1]
        self._counting = torch.arange(width, dtype=torch.int32, device=device)
        self._eos_token_ids = eos_token_ids
        self._rows_at_once = rows_at_once(vocab_size)
        # Decode rows of the widest step, padded, and as many chunks beside them as there are rows.
        max_wanted = max_num_seqs * (1 + self._widths[-1] if num_drafts else 1)
        self._drawn_sizes = padded_sizes(max_wanted)
        self._masks = DeviceMasks(max_wanted, vocab_size, device)
        self._changed: Tensor | None = None
        self._sampling_scratch = make_sampling_scratch(max_wanted, vocab_size, device)
        self._scratch = Scratch()
        # The largest first, in whose scratch the others lie.
        self._drawn_work = {size: self._make_work(size) for size in reversed(self._drawn_sizes)}
        self._work = {
            (size, width): self._make_work(size * width)
            for size in self._sizes
            for width in self._widths
        }
        self._decode = {
            (size, width): self._make_buffers(size, width)
            for size in self._sizes
            for width in self._widths
        }
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
        self._host = HostBuffers(aligned(max_wanted) + max_num_seqs, device)
        self._has_begun = False
        """A step has, and its draw is yet to come."""
        # What was made here was made on another stream than that of the steps.
        self.synchronize(everything=True)
        self.on_launch: Callable[[tuple[torch.cuda.Event, torch.cuda.Event]], None] | None = None
        """For measurements: told the events around every step."""

    # Rows

    def open_row(
        self, sampling: SamplingParams, sample_index: int, history: History | None = None
    ) -> RowHandle:
        shaping = Shaping.of(sampling, history, self._eos_token_ids)
        return RowHandle(self._state.open_slot(), sampling, sample_index, shaping)

    def close_row(self, handle: RowHandle) -> None:
        self._state.close_slot(handle.slot)

    @property
    def num_free_rows(self) -> int:
        return self._state.num_free_slots

    # Steps

    def launch(self, batch: Batch) -> DeviceStep:
        return self.begin(batch).draw({})

    def begin(self, batch: Batch) -> DeviceBegun:
        if self._has_begun:
            raise RuntimeError("the step before has not drawn yet")
        layout = Layout()
        with self._stepping(layout):
            try:
                self._lay_out(batch, layout)
                started = self._measured_event()
                draw = self._begin_step(batch, layout)
                computed = self._event()
            finally:
                self._close(layout.scratch)
        self._has_begun = True

        def finish() -> DeviceStep:
            self._has_begun = False
            with self._stepping(layout):
                step = draw()
                ended = self._measured_event()
            if self.on_launch is not None and started is not None and ended is not None:
                self.on_launch((started, ended))
            return step

        return DeviceBegun(batch.rows, finish, computed)

    def logits(self, batch: Batch) -> Tensor:
        with self._on_stream():
            layout = Layout()
            try:
                self._lay_out(batch, layout)
                hidden, _ = self._compute(batch, layout, [row.num_logits for row in batch.rows])
                logits = self._head(hidden)
            finally:
                self._distrust_device(layout)
                self._close(layout.scratch)
            # Row by row, as the batch has them; of one row in the order of its tokens.
            places = [place for place, row in enumerate(layout.wanted) if row >= 0]
            places.sort(key=lambda place: layout.wanted[place])
            result = logits[places].float()
        self.synchronize()
        return result

    def capture(self, *, graphs: bool) -> None:
        """Compiles the kernels of decode; captures a graph for every padded size and width if asked
        to."""
        with self._on_stream():
            pool = None
            # The largest first: the smaller ones find room in its memory.
            for buffers in sorted(
                self._decode.values(), key=lambda each: each.size * each.width, reverse=True
            ):
                self._decode_forward(buffers)
                self._decode_draw(buffers)
                self.synchronize()
                if not graphs or self._stream is None:
                    continue
                forward, draw = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
                with torch.cuda.graph(forward, pool=pool, stream=self._stream):
                    self._decode_forward(buffers)
                pool = forward.pool()
                with torch.cuda.graph(draw, pool=pool, stream=self._stream):
                    self._decode_draw(buffers)
                buffers.graphs = forward, draw

    def synchronize(self, *, everything: bool = False) -> None:
        """Waits for the steps; for all that the device has to do if asked to."""
        if self._stream is not None:
            if everything:
                torch.cuda.synchronize(self._device)
            self._stream.synchronize()

    @contextmanager
    def _stepping(self, layout: Layout) -> Iterator[None]:
        with self._on_stream():
            try:
                yield
            except BaseException:
                self._distrust_device(layout)
                raise

    def _event(self) -> torch.cuda.Event | None:
        """What the stream has to do so far is done."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def _measured_event(self) -> torch.cuda.Event | None:
        if self.on_launch is None:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _lay_out(self, batch: Batch, layout: Layout) -> None:
        """Sorts rows into decode rows and chunks, and notes what the device does not know yet."""
        if not batch.rows:
            raise ValueError("a batch needs rows")
        if len(batch.rows) > self._sizes[-1]:
            raise ValueError(f"a batch of {len(batch.rows)} rows exceeds {self._sizes[-1]}")
        for row in batch.rows:
            self._check(row)
        for index, row in enumerate(batch.rows):
            handle = row.handle
            if handle is None:
                handle = self.open_row(row.sampling or _GREEDY, row.sample_index, row.history)
                layout.scratch.append(handle)
            layout.handles.append(handle)
            if not row.is_chunk:
                layout.decode.append(index)
                if row.draft_ids:
                    layout.width = self._widths[-1]
            else:
                layout.chunks.append(index)
        for row, handle in zip(batch.rows, layout.handles, strict=True):
            self._note(row, handle, has_drafts=layout.width > 1)
        if layout.decode:
            layout.size = _padded(len(layout.decode), self._sizes)
            self._state.send_rows(layout.size, [layout.handles[i].slot for i in layout.decode])

    def _note(self, row: BatchRow, handle: RowHandle, *, has_drafts: bool) -> None:
        """`has_drafts`: the step's rows of one token may bring some along."""
        state, slot = self._state, handle.slot
        if not handle.is_sent:
            state.send_sampling(handle)
            handle.is_sent = True
        if handle.shaping is not None and row.sampling is not None:
            self._note_shaping(row, handle, handle.shaping)
        num_blocks = len(row.block_tables[0])
        if num_blocks > handle.num_blocks:
            for group, table in enumerate(row.block_tables):
                state.send_blocks(group, slot, handle.num_blocks, table[handle.num_blocks :])
            handle.num_blocks = num_blocks
        end = row.context_len
        if not row.is_chunk:
            # The step moves the length on by its tokens.
            if handle.context_len != row.position:
                state.send_context_len(slot, row.position)
            if handle.drawn_at != row.position:
                assert row.token_ids is not None
                state.send_token(slot, row.token_ids[0])
            if has_drafts and (row.draft_ids or handle.num_drafts):
                state.send_drafts(slot, row.draft_ids)
                handle.num_drafts = len(row.draft_ids)
        else:
            state.send_context_len(slot, end)
        handle.context_len = end
        # A chunk in the middle of a prompt leaves no token behind.
        handle.drawn_at = end if row.sampling is not None else -1

    def _note_shaping(self, row: BatchRow, handle: RowHandle, shaping: Shaping) -> None:
        known_to = row.position + row.num_known
        if not handle.is_marked:
            # The token of a decode row is counted where the step begins.
            end = row.position if row.num_known == 1 else known_to
            self._state.send_marks(handle.slot, shaping.fresh_marks(self._vocab_size, end))
            handle.is_marked = True
        if shaping.needs_last_tokens:
            bans = [
                (num_before, token_id)
                for num_before in range(1 + len(row.draft_ids))
                for token_id in shaping.banned_behind(known_to, row.draft_ids[:num_before])
            ]
            if bans or handle.num_bans:
                self._state.send_bans(handle.slot, bans)
                handle.num_bans = len(bans)

    def _check(self, row: BatchRow) -> None:
        """Raises ValueError for what must not reach the device."""
        if row.num_tokens < 1:
            raise ValueError("a batch needs rows and each row a token")
        if row.context_len > self._max_model_len:
            raise ValueError(f"a row of {row.context_len} tokens exceeds max_model_len")
        if row.draft_ids and (row.num_known != 1 or len(row.draft_ids) > self._num_drafts):
            raise ValueError(f"a row of one token may bring {self._num_drafts} drafts along")
        if len(row.block_tables) != len(self._caches):
            raise ValueError(f"rows need {len(self._caches)} block tables")
        handle = row.handle
        num_known = 0 if handle is None else handle.num_blocks
        first_written = row.position // self._block_size
        for table, num_blocks in zip(row.block_tables, self._num_blocks, strict=True):
            if len(table) * self._block_size < row.context_len:
                raise ValueError("a block table is shorter than its row's context")
            new = table[num_known:]
            if not new:
                continue
            if min(new) < NO_BLOCK or max(new) >= num_blocks:
                raise ValueError("a block table names a block that does not exist")
            if min(new) == NO_BLOCK and NO_BLOCK in table[first_written:]:
                raise ValueError("a row's tokens have no block")
        if row.token_ids is None and (handle is None or handle.drawn_at != row.position):
            raise ValueError("a row without tokens, for which none was drawn")
        shaping = None if handle is None else handle.shaping
        if row.token_ids is None and shaping is not None and handle is not None:
            if shaping.needs_last_tokens or not handle.is_marked:
                raise ValueError("a row without tokens that have a say in what is drawn")

    def _distrust_device(self, layout: Layout) -> None:
        """What the device knows of these rows may be anything: all of it is sent again."""
        for handle in layout.handles:
            handle.is_sent = handle.is_marked = False
            handle.context_len = handle.drawn_at = -1
            handle.num_blocks = 0
            # Not known: the next step with any sends how many there are.
            handle.num_drafts = handle.num_bans = -1
        self._state.forget()

    def _begin_step(self, batch: Batch, layout: Layout) -> Callable[[], DeviceStep]:
        """Launches the forward pass; returns what launches the draw."""
        rows = batch.rows
        # Behind a row of one token, and behind each of its drafts, or behind a chunk's last token.
        num_wanted = [
            0 if row.sampling is None else 1 + len(row.draft_ids) if row.num_known == 1 else 1
            for row in rows
        ]
        if layout.chunks:
            hidden, draw = self._begin_mixed(batch, layout, num_wanted)
        else:
            hidden, draw = self._begin_decode(layout, num_wanted)
        wanted = [row if row >= 0 and num_wanted[row] else -1 for row in layout.wanted]

        def finish() -> DeviceStep:
            self._masks.send(rows, layout.wanted)
            results = draw()
            logprobs = self._tell_of_drawn(rows, wanted, hidden, results)
            if layout.width == 1:
                results = results[: len(wanted)]
            return self._fetch(batch, layout, results, wanted, logprobs)

        return finish

    def _begin_mixed(
        self, batch: Batch, layout: Layout, num_wanted: Sequence[int]
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """Of a step with prompt chunks: the hidden states that tokens are drawn of, and what draws
        them, once, into its results."""
        hidden, columns = self._compute(batch, layout, num_wanted)
        num_tokens = len(hidden)
        results = self._make_results(num_tokens, layout.size)
        if not num_tokens:
            return hidden, lambda: results
        undrawn = [self._head(hidden)]

        def draw() -> Tensor:
            num_guess_rows = layout.size * layout.width if layout.width > 1 else 0
            # Nobody has them behind the draw: there may be as many again.
            logits = undrawn.pop()
            self._draw(logits, columns.rows, columns.back, results[:num_tokens], num_guess_rows)
            del logits
            if layout.width > 1:
                self._accept(self._state.rows[layout.size], results, num_tokens)
            return results

        return hidden, draw

    def _begin_decode(
        self, layout: Layout, num_wanted: Sequence[int]
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """As `_begin_mixed`, without chunks."""
        buffers = self._decode[layout.size, layout.width]
        layout.wanted = self._wanted_of_decode(layout, num_wanted)
        self._host.send(self._state, None)
        if buffers.graphs is not None:
            buffers.graphs[0].replay()
        else:
            self._decode_forward(buffers)
        assert buffers.hidden is not None

        def draw() -> Tensor:
            if buffers.graphs is not None:
                buffers.graphs[1].replay()
            else:
                self._decode_draw(buffers)
            return buffers.results

        return buffers.hidden, draw

    def _tell_of_drawn(
        self, rows: Sequence[BatchRow], wanted: Sequence[int], hidden: Tensor, results: Tensor
    ) -> Told | None:
        """Of the tokens that rows ask for; no kernel runs where none does."""
        if all(row.sampling is None or row.sampling.logprobs is None for row in rows):
            return None
        places, num_top = asking(wanted, rows)
        if not places:
            return None
        return tell_of_drawn(self._head(hidden), places, num_top, results[: len(wanted)])

    def _wanted_of_decode(self, layout: Layout, num_wanted: Sequence[int]) -> list[int]:
        """Row of the batch for each token of the decode rows; −1 for padding."""
        width = layout.width
        wanted = [-1] * (layout.size * width)
        for place, row in enumerate(layout.decode):
            for j in range(max(1, num_wanted[row])):
                wanted[place * width + j] = row
        return wanted

    def _decode_forward(self, buffers: DecodeBuffers) -> None:
        """A step without prompt chunks up to its logits; reads and writes fixed addresses only."""
        self._begin(buffers.input_ids, buffers, buffers.plans)
        buffers.hidden = self._model.hidden_states(
            buffers.input_ids, buffers.positions, self._caches, buffers.plans
        )
        buffers.logits = self._model.logits(buffers.hidden)

    def _decode_draw(self, buffers: DecodeBuffers) -> None:
        """The rest of it, likewise."""
        logits, buffers.logits = buffers.logits, None
        assert logits is not None
        self._draw(
            logits,
            buffers.token_rows,
            buffers.back,
            buffers.tokens,
            buffers.size * buffers.width if buffers.width > 1 else 0,
        )
        if buffers.width > 1:
            self._accept(buffers.rows, buffers.results, buffers.size * buffers.width)

    def _compute(
        self, batch: Batch, layout: Layout, num_wanted: Sequence[int]
    ) -> tuple[Tensor, WantedRows]:
        """Runs a step with prompt chunks; of each row the logits at its last `num_wanted` tokens
        are wanted.

        Returns [R, hidden] of what is wanted, and of padding, for the head, and what they are of;
        `layout.wanted` says which rows.
        """
        columns, has_back = self._pack(batch, layout, num_wanted)
        packed = self._host.send(self._state, columns.packed)
        assert packed is not None
        sent = columns.unpack(packed)
        wanted = WantedRows(sent.wanted, sent.rows, sent.back if has_back else None)
        plans = self._plan(layout, columns, sent)
        if layout.size:
            buffers = self._decode[layout.size, layout.width]
            here = replace(buffers, positions=sent.positions, slots=sent.slots)
            self._begin(sent.input_ids, here, plans)
        asks = any(batch.rows[i].prompt_logprobs is not None for i in layout.chunks)
        if asks or columns.num_wanted > self._drawn_sizes[-1]:
            # More are wanted than ever draw at once: all tokens go through the last layer.
            hidden = self._model.hidden_states(sent.input_ids, sent.positions, self._caches, plans)
            if asks:
                self._tell_of_prompts(batch, layout, hidden)
            hidden = hidden.index_select(0, wanted.tokens)
        else:
            hidden = self._model.hidden_states(
                sent.input_ids,
                sent.positions,
                self._caches,
                plans,
                (wanted.tokens, self._plans_of(wanted, plans)),
            )
        return hidden, wanted

    def _head(self, hidden: Tensor) -> Tensor:
        """[R, hidden] → logits [R, vocab]."""
        if not len(hidden):
            return hidden.new_empty(0, self._vocab_size)
        return self._model.logits(hidden)

    def _tell_of_prompts(self, batch: Batch, layout: Layout, hidden: Tensor) -> None:
        """hidden: [T, hidden], of all of the step's tokens."""
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
                    self._model.logits,
                    most=self._rows_at_once,
                    padded=self._padded_head,
                )
            token += row.num_tokens

    def _padded_head(self, num_rows: int) -> int:
        return (
            _padded(num_rows, self._drawn_sizes) if num_rows <= self._drawn_sizes[-1] else num_rows
        )

    def _pack(
        self, batch: Batch, layout: Layout, num_wanted: Sequence[int]
    ) -> tuple[ChunkColumns, bool]:
        """The step's columns, and whether a wanted token has others of its slot behind it."""
        places = self._place_wanted(batch, layout, num_wanted)
        num_padded = len(places)
        if 0 < num_padded <= self._drawn_sizes[-1]:
            # As many rows of logits as decode has in one of its graphs: those are compiled.
            num_padded = _padded(num_padded, self._drawn_sizes)
        layout.wanted += [-1] * (num_padded - len(places))
        columns = chunk_columns(
            layout.size * layout.width,
            [(layout.handles[i].slot, batch.rows[i]) for i in layout.chunks],
            places,
            num_padded,
            num_groups=len(self._caches),
            block_size=self._block_size,
            head_dim=max(kv.shape[5] for kv in self._caches),
            itemsize=self._caches[0].element_size(),
            by_chunk=any(self._are_latents),
        )
        return columns, any(behind for _, _, behind in places)

    def _plan(self, layout: Layout, columns: ChunkColumns, sent: SentColumns) -> list[DevicePlan]:
        """By cache group: where a step's tokens are stored and what they attend to."""
        rows: Tensor | None = None
        work: Sequence[DecodeWork | None] = [None] * len(self._caches)
        if layout.size:
            rows = self._decode[layout.size, layout.width].token_rows
            work = self._work[layout.size, layout.width]
        return [
            DevicePlan(
                slots=sent.slots[group],
                context_lens=self._state.context_lens,
                block_tables=self._state.block_tables[group],
                rows=rows,
                work=work[group],
                tiles=sent.tiles if columns.num_tiles else None,
                block_m=columns.block_m,
                window=self._windows[group],
                **self._of_chunks(columns, group),
            )
            for group in range(len(self._caches))
        ]

    def _of_chunks(self, columns: ChunkColumns, group: int) -> dict[str, Any]:
        """What a plan says of chunks and padding."""
        if not self._are_latents[group]:
            return {"attended": self._attended(columns, group) if columns.num_padding else None}
        return {
            "chunks": columns.chunks,
            "num_padding": columns.num_padding,
            "counting": self._counting,
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

    def _plans_of(self, wanted: WantedRows, plans: Sequence[DevicePlan]) -> list[DevicePlan]:
        """What the wanted tokens attend to: as in a decode step, the slot's keys up to them."""
        num_rows = len(wanted.rows)
        drawn: list[DevicePlan] = []
        for group, plan in enumerate(plans):
            work = self._drawn_work[num_rows][group] if num_rows else None
            self._plan_work(wanted.rows, work, wanted.back, drawn)
            alone = replace(plan, rows=wanted.rows, work=work, tiles=None, attended=None)
            drawn.append(replace(alone, chunks=(), num_padding=0))
        return drawn

    def _plan_work(
        self,
        rows: Tensor,
        work: DecodeWork | None,
        back: Tensor | None,
        planned: Sequence[DevicePlan],
    ) -> None:
        """Lists the items of a group's decode attention, unless an earlier group has the same."""
        if work is None or any(plan.work is work for plan in planned):
            return
        window = self._windows[len(planned)]
        plan_decode(rows, self._state.context_lens, work, back=back, window=window)

    def _attended(self, columns: ChunkColumns, group: int) -> Tensor:
        """Nobody reads what becomes of the padding, but numbers shall go on through the layers."""
        attended = torch.empty(
            columns.num_tokens,
            self._num_heads,
            self._caches[group].shape[5],
            dtype=self._caches[group].dtype,
            device=self._device,
        )
        attended[-columns.num_padding :].zero_()
        return attended

    def _begin(
        self, input_ids: Tensor, buffers: DecodeBuffers, plans: Sequence[DevicePlan]
    ) -> None:
        """Fills in the decode rows' tokens and places, and moves their lengths on."""
        state = self._state
        rows = state.rows[buffers.size]
        if buffers.width == 1:
            begin_step(
                rows,
                state.token_ids,
                state.context_lens,
                state.block_tables,
                input_ids,
                buffers.positions,
                buffers.slots,
                block_size=self._block_size,
                counting=state.shaping.counting,
            )
        else:
            assert buffers.back is not None
            begin_drafted_step(
                rows,
                state.token_ids,
                state.context_lens,
                state.block_tables,
                state.draft_ids,
                state.num_drafts,
                input_ids,
                buffers.positions,
                buffers.slots,
                buffers.token_rows,
                buffers.back,
                block_size=self._block_size,
                counting=state.shaping.counting,
            )
        for number, plan in enumerate(plans):
            self._plan_work(buffers.token_rows, plan.work, buffers.back, plans[:number])

    def _draw(
        self,
        logits: Tensor,
        rows: Tensor,
        back: Tensor | None,
        out: Tensor,
        num_guess_rows: int,
    ) -> None:
        """`num_guess_rows`: of a step with drafts, the rows of logits that decode rows have; they
        come first."""
        state = self._state
        changed = self._changed_rows(logits)
        shape_logits(
            logits,
            rows,
            state.context_lens,
            state.shaping,
            logits if changed is None else changed,
            back=back,
            guesses=Guesses(state.draft_ids, state.num_drafts, num_guess_rows)
            if num_guess_rows
            else None,
        )
        self._masks.apply(logits)
        if changed is not None:
            self._masks.apply(changed[: len(logits)])
        draw(
            logits,
            rows,
            state.context_lens,
            state.temperature,
            state.top_k,
            state.top_p,
            state.min_p,
            state.streams,
            state.token_ids,
            out=out,
            work=self._sampling_scratch,
            back=back,
            changed=changed,
            is_changed=None if changed is None else state.shaping.counting.is_shaped,
        )

    def _changed_rows(self, logits: Tensor) -> Tensor | None:
        """Where the rows go that change; None: they stay where they are. Penalties are finer than
        16 bits are."""
        if logits.dtype == torch.float32:
            return None
        if self._changed is None:
            # With the first step, so that it is there before memory is measured or captured.
            most = self._drawn_sizes[-1]
            self._changed = torch.empty(
                most, self._vocab_size, dtype=torch.float32, device=self._device
            )
        return self._changed

    def _accept(self, rows: Tensor, results: Tensor, num_tokens: int) -> None:
        """results: drawn tokens, those of the decode rows first; behind them goes what stands."""
        state = self._state
        accept_drafts(
            rows,
            results,
            state.draft_ids,
            state.num_drafts,
            state.token_ids,
            state.context_lens,
            results[aligned(num_tokens) :],
            counting=state.shaping.counting,
        )

    def _fetch(
        self,
        batch: Batch,
        layout: Layout,
        results: Tensor,
        wanted: list[int],
        logprobs: Told | None,
    ) -> DeviceStep:
        host = self._host.fetch(results)
        done = self._event()
        drafted = []
        if layout.width > 1:
            counts = aligned(len(wanted))
            drafted = [
                (row, counts + place, layout.handles[row], len(batch.rows[row].draft_ids))
                for place, row in enumerate(layout.decode)
                if batch.rows[row].draft_ids
            ]
        return DeviceStep(wanted, len(batch.rows), host, done, drafted, logprobs, layout.of_prompts)

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _close(self, handles: Sequence[RowHandle]) -> None:
        for handle in handles:
            self.close_row(handle)

    def _make_results(self, num_tokens: int, num_rows: int) -> Tensor:
        num_words = aligned(num_tokens) + num_rows
        return torch.empty(num_words, dtype=torch.int32, device=self._device)

    def _make_work(self, num_rows: int) -> list[DecodeWork]:
        """By cache group; groups whose work is cut alike share it, for layers run one by one."""
        made: dict[tuple[int, ...], DecodeWork] = {}
        work = []
        for kv, window, spec in zip(self._caches, self._windows, self._specs, strict=True):
            _, num_kv_heads, _, _, _, head_dim = kv.shape
            config = None
            if isinstance(spec, Latent):
                head_dim = spec.rank
                config = latent_decode_config(num_rows, self._num_heads, kv)
            key = (num_kv_heads, head_dim, window)
            if key not in made:
                made[key] = make_work(
                    num_rows,
                    num_kv_heads,
                    self._num_heads,
                    head_dim,
                    self._device,
                    config=config,
                    scratch=self._scratch if config is not None else None,
                )
            work.append(made[key])
        return work

    def _make_buffers(self, size: int, width: int) -> DecodeBuffers:
        state, num_tokens = self._state, size * width

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        slots = zeros(len(self._caches), num_tokens, dtype=torch.int64)
        token_rows = state.rows[size] if width == 1 else zeros(num_tokens)
        plans = [
            DevicePlan(
                slots=slots[group],
                context_lens=state.context_lens,
                block_tables=state.block_tables[group],
                rows=token_rows,
                work=work,
                tiles=None,
                block_m=0,
                window=self._windows[group],
            )
            for group, work in enumerate(self._work[size, width])
        ]
        return DecodeBuffers(
            size,
            width,
            zeros(num_tokens),
            zeros(num_tokens),
            slots,
            state.rows[size],
            token_rows,
            None if width == 1 else zeros(num_tokens),
            self._make_results(num_tokens, size),
            plans,
        )


def _padded(num_rows: int, sizes: Sequence[int]) -> int:
    return sizes[bisect_left(sizes, num_rows)]
