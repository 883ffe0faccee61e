"""Steps whose state stays on the device: Triton kernels, and CUDA graphs for decode.

    launch(batch)
      host    what changed of slots, block tables and rows      ─► updates    (batch_state.py)
              prompt chunks                                      ─► columns
      device  copy updates, scatter ─► begin_step ─► layers ─► logits ─► draw ─► tokens to the host
                                       └────── one CUDA graph per padded batch size ──────┘

Nothing waits for the device: a decode row's token is where the step before left it, so step N + 1
can be launched while N runs. `DeviceStep.result` waits for the copy of the tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from baton.kernels.batch_state import begin_step
from baton.kernels.decode_attention import make_work, plan_decode
from baton.kernels.sampling import draw, make_sampling_work
from baton.shared.engine.batch import Batch, BatchRow, RowHandle
from baton.shared.engine.batch_state import BatchState
from baton.shared.engine.device_columns import StepColumns, step_columns
from baton.shared.engine.host_buffers import HostBuffers
from baton.shared.engine.kv_cache import KvCache
from baton.shared.engine.steps import Model
from baton.shared.engine.triton_operations import DevicePlan
from baton.shared.kv.sequence import SamplingParams

_GREEDY = SamplingParams(temperature=0.0)


def padded_sizes(max_num_seqs: int) -> list[int]:
    """The sizes that decode batches are padded to; a few per cent are wasted at most from 16 up."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128]
    sizes += range(160, max(max_num_seqs, 160) + 32, 32)
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


@dataclass(slots=True)
class DeviceStep:
    """A step in flight."""

    rows: list[int]
    """Row of the batch that each drawn token is for; −1: nobody wants it."""
    num_rows: int
    tokens: Tensor
    """int32 [≥ len(rows)] on the host, once `done`."""
    done: torch.cuda.Event | None

    def result(self) -> list[int | None]:
        if self.done is not None:
            self.done.synchronize()
        result: list[int | None] = [None] * self.num_rows
        for row, token in zip(self.rows, self.tokens.tolist(), strict=False):
            if row >= 0:
                result[row] = token
        return result


@dataclass(slots=True)
class _DecodeBuffers:
    """What a decode step of one padded size reads and writes; a graph keeps their addresses."""

    size: int
    input_ids: Tensor
    positions: Tensor
    slots: Tensor
    tokens: Tensor
    plan: DevicePlan
    graph: torch.cuda.CUDAGraph | None = None


@dataclass(slots=True)
class _Layout:
    """Who is where in a step."""

    handles: list[RowHandle] = field(default_factory=list)
    """By row of the batch."""
    decode: list[int] = field(default_factory=list)
    """Rows of one token, in the batch's order."""
    chunks: list[int] = field(default_factory=list)
    size: int = 0
    """Of the decode rows, padded."""
    wanted: list[int] = field(default_factory=list)
    """Row of the batch for each row of logits; −1 = padding."""
    scratch: list[RowHandle] = field(default_factory=list)
    """Handles of rows that nothing is kept of."""


class DeviceSteps:
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
    ) -> None:
        self.kv_cache = kv_cache
        self._model = model
        self._device = device
        self._num_heads = num_heads
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._block_size = kv_cache.block_size
        (self._kv,) = kv_cache.padded_tensors
        self._sizes = padded_sizes(max_num_seqs)
        # Sequences beyond those of one step may be waiting for their turn.
        num_slots = 2 * max_num_seqs + 16
        max_blocks = -(-max_model_len // self._block_size)
        self._state = BatchState(num_slots, max_blocks, self._sizes, device)
        self._sampling_work = make_sampling_work(max_num_seqs, vocab_size, device)
        _, num_kv_heads, _, _, _, head_dim = self._kv.shape
        self._work = {
            size: make_work(size, num_kv_heads, num_heads, head_dim, device) for size in self._sizes
        }
        self._drawn_work = {
            size: make_work(size, num_kv_heads, num_heads, head_dim, device) for size in self._sizes
        }
        self._decode = {size: self._make_buffers(size) for size in self._sizes}
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
        self._host = HostBuffers(max_num_seqs, device)
        # What was made here was made on another stream than that of the steps.
        self.synchronize(everything=True)
        self.on_launch: Callable[[tuple[torch.cuda.Event, torch.cuda.Event]], None] | None = None
        """For measurements: told the events around every step."""

    # Rows

    def open_row(self, sampling: SamplingParams, sample_index: int) -> RowHandle:
        return RowHandle(self._state.open_slot(), sampling, sample_index)

    def close_row(self, handle: RowHandle) -> None:
        self._state.close_slot(handle.slot)

    @property
    def num_free_rows(self) -> int:
        return self._state.num_free_slots

    # Steps

    def launch(self, batch: Batch) -> DeviceStep:
        with self._on_stream():
            layout = _Layout()
            try:
                self._lay_out(batch, layout)
                return self._timed(self._launch, batch, layout)
            except BaseException:
                self._distrust_device(layout)
                raise
            finally:
                self._close(layout.scratch)

    def logits(self, batch: Batch) -> Tensor:
        with self._on_stream():
            layout = _Layout()
            try:
                self._lay_out(batch, layout)
                logits, _ = self._compute(batch, layout, draws=[True] * len(batch.rows))
            finally:
                self._distrust_device(layout)
                self._close(layout.scratch)
            places = [place for place, row in enumerate(layout.wanted) if row >= 0]
            result = torch.empty(
                len(places), self._vocab_size, dtype=torch.float32, device=self._device
            )
            result[[layout.wanted[place] for place in places]] = logits[places].float()
        self.synchronize()
        return result

    def capture(self, *, graphs: bool) -> None:
        """Compiles the kernels of decode; captures a graph for every padded size if asked to."""
        with self._on_stream():
            pool = None
            # The largest first: the smaller ones find room in its memory.
            for size in reversed(self._sizes):
                buffers = self._decode[size]
                self._decode_step(buffers)
                self.synchronize()
                if not graphs or self._stream is None:
                    continue
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                    self._decode_step(buffers)
                buffers.graph, pool = graph, graph.pool()

    def synchronize(self, *, everything: bool = False) -> None:
        """Waits for the steps; for all that the device has to do if asked to."""
        if self._stream is not None:
            if everything:
                torch.cuda.synchronize(self._device)
            self._stream.synchronize()

    def _timed(
        self, launch: Callable[[Batch, _Layout], DeviceStep], batch: Batch, layout: _Layout
    ) -> DeviceStep:
        if self.on_launch is None:
            return launch(batch, layout)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        step = launch(batch, layout)
        end.record()
        self.on_launch((start, end))
        return step

    def _lay_out(self, batch: Batch, layout: _Layout) -> None:
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
                handle = self.open_row(row.sampling or _GREEDY, row.sample_index)
                layout.scratch.append(handle)
            layout.handles.append(handle)
            if row.num_tokens == 1:
                layout.decode.append(index)
            else:
                layout.chunks.append(index)
            self._note(row, handle)
        num_decode = len(layout.decode)
        if num_decode:
            layout.size = self._padded(num_decode)
            self._state.send_rows(layout.size, [layout.handles[i].slot for i in layout.decode])
        layout.wanted = layout.decode + [-1] * (layout.size - num_decode)

    def _padded(self, num_rows: int) -> int:
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def _note(self, row: BatchRow, handle: RowHandle) -> None:
        state, slot, table = self._state, handle.slot, row.block_tables[0]
        if not handle.is_sent:
            state.send_sampling(handle)
            handle.is_sent = True
        if len(table) > handle.num_blocks:
            state.send_blocks(slot, handle.num_blocks, table[handle.num_blocks :])
            handle.num_blocks = len(table)
        end = row.context_len
        if row.num_tokens == 1:
            # begin_step moves the length on by one.
            if handle.context_len != row.position:
                state.send_context_len(slot, row.position)
            if handle.drawn_at != row.position:
                assert row.token_ids is not None
                state.send_token(slot, row.token_ids[0])
        else:
            state.send_context_len(slot, end)
        handle.context_len = end
        # A chunk in the middle of a prompt leaves no token behind.
        handle.drawn_at = end if row.sampling is not None else -1

    def _check(self, row: BatchRow) -> None:
        """Raises ValueError for what must not reach the device."""
        if row.num_tokens < 1:
            raise ValueError("a batch needs rows and each row a token")
        if row.context_len > self._max_model_len:
            raise ValueError(f"a row of {row.context_len} tokens exceeds max_model_len")
        if len(row.block_tables) != 1:
            raise ValueError("rows need 1 block tables")
        table, handle = row.block_tables[0], row.handle
        num_known = 0 if handle is None else handle.num_blocks
        if len(table) * self._block_size < row.context_len:
            raise ValueError("a block table is shorter than its row's context")
        if len(table) > num_known:
            new = table[num_known:]
            if min(new) < 0 or max(new) >= self.kv_cache.num_blocks:
                raise ValueError("a block table names a block that does not exist")
        if row.token_ids is None and (handle is None or handle.drawn_at != row.position):
            raise ValueError("a row without tokens, for which none was drawn")

    def _distrust_device(self, layout: _Layout) -> None:
        """What the device knows of these rows may be anything: all of it is sent again."""
        for handle in layout.handles:
            handle.is_sent = False
            handle.context_len = handle.drawn_at = -1
            handle.num_blocks = 0
        self._state.forget()

    def _launch(self, batch: Batch, layout: _Layout) -> DeviceStep:
        draws = [row.sampling is not None for row in batch.rows]
        if layout.chunks:
            logits, rows = self._compute(batch, layout, draws)
            tokens = torch.empty(len(logits), dtype=torch.int32, device=self._device)
            if len(logits):
                self._draw(logits, rows, tokens)
        else:
            buffers = self._decode[layout.size]
            self._host.send(self._state, None)
            if buffers.graph is not None:
                buffers.graph.replay()
            else:
                self._decode_step(buffers)
            tokens = buffers.tokens
        wanted = [row if row >= 0 and draws[row] else -1 for row in layout.wanted]
        return self._fetch(tokens, wanted, len(batch.rows))

    def _decode_step(self, buffers: _DecodeBuffers) -> None:
        """All of a step without prompt chunks; reads and writes fixed addresses only."""
        plan = buffers.plan
        self._begin(buffers.input_ids, plan)
        hidden = self._model.hidden_states(buffers.input_ids, buffers.positions, [self._kv], [plan])
        assert plan.rows is not None
        self._draw(self._model.logits(hidden), plan.rows, buffers.tokens)

    def _compute(
        self, batch: Batch, layout: _Layout, draws: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        """Runs a step with prompt chunks.

        Returns the logits [R, vocab] of the decode rows, of the chunks that draw, and of padding,
        and the slots [R] that they are of; `layout.wanted` says which rows they are.
        """
        rows, handles = batch.rows, layout.handles
        slots_of_decode = [handles[i].slot for i in layout.decode]
        layout.wanted = layout.decode + [i for i in layout.chunks if draws[i]]
        # As many rows of logits as decode has in one of its graphs: those kernels are compiled.
        num_drawn = self._padded(len(layout.wanted)) if layout.wanted else 0
        layout.wanted += [-1] * (num_drawn - len(layout.wanted))
        columns = step_columns(
            slots_of_decode + [-1] * (layout.size - len(layout.decode)),
            [(handles[i].slot, rows[i], draws[i]) for i in layout.chunks],
            num_drawn,
            block_size=self._block_size,
            head_dim=self._kv.shape[5],
            itemsize=self._kv.element_size(),
        )
        sent = self._host.send(self._state, columns.packed)
        assert sent is not None
        num_tokens = columns.num_tokens
        slots = sent[: 2 * num_tokens].view(torch.int64)
        input_ids = sent[2 * num_tokens : 3 * num_tokens]
        positions = sent[3 * num_tokens : 4 * num_tokens]
        tiles = sent[4 * num_tokens :][: 4 * columns.num_tiles]
        behind = 4 * num_tokens + tiles.numel()
        last = sent[behind:][:num_drawn]
        draw_rows = sent[behind + -(-num_drawn // 4) * 4 :][:num_drawn]
        has_decode = layout.size > 0
        plan = DevicePlan(
            positions=positions,
            slots=slots,
            context_lens=self._state.context_lens,
            block_tables=self._state.block_tables,
            rows=self._state.rows[layout.size] if has_decode else None,
            work=self._work[layout.size] if has_decode else None,
            tiles=tiles.view(-1, 4) if columns.num_tiles else None,
            block_m=columns.block_m,
            attended=self._attended(columns) if columns.num_padding else None,
        )
        if has_decode:
            self._begin(input_ids, plan)
        wanted = (last, [self._plan_of_drawn(draw_rows, plan)])
        hidden = self._model.hidden_states(input_ids, positions, [self._kv], [plan], wanted)
        if not num_drawn:
            return hidden.new_empty(0, self._vocab_size), draw_rows
        return self._model.logits(hidden), draw_rows

    def _plan_of_drawn(self, draw_rows: Tensor, plan: DevicePlan) -> DevicePlan:
        """What the last tokens of rows attend to: as in a decode step, all keys of the slot."""
        work = None
        if len(draw_rows):
            work = self._drawn_work[len(draw_rows)]
            plan_decode(draw_rows, self._state.context_lens, work)
        return replace(plan, rows=draw_rows, work=work, tiles=None, attended=None)

    def _attended(self, columns: StepColumns) -> Tensor:
        """Nobody reads what becomes of the padding, but numbers shall go on through the layers."""
        attended = torch.empty(
            columns.num_tokens,
            self._num_heads,
            self._kv.shape[5],
            dtype=self._kv.dtype,
            device=self._device,
        )
        attended[-columns.num_padding :].zero_()
        return attended

    def _begin(self, input_ids: Tensor, plan: DevicePlan) -> None:
        """Fills in the decode rows' tokens and places, and moves their lengths on by one."""
        state = self._state
        assert plan.rows is not None and plan.work is not None
        begin_step(
            plan.rows,
            state.token_ids,
            state.context_lens,
            state.block_tables,
            input_ids,
            plan.positions,
            plan.slots,
            block_size=self._block_size,
        )
        plan_decode(plan.rows, state.context_lens, plan.work)

    def _draw(self, logits: Tensor, rows: Tensor, out: Tensor) -> None:
        state = self._state
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
            work=self._sampling_work,
        )

    def _fetch(self, tokens: Tensor, rows: list[int], num_rows: int) -> DeviceStep:
        host = self._host.fetch(tokens)
        done = None
        if self._stream is not None:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return DeviceStep(rows, num_rows, host, done)

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _close(self, handles: Sequence[RowHandle]) -> None:
        for handle in handles:
            self.close_row(handle)

    def _make_buffers(self, size: int) -> _DecodeBuffers:
        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=self._device)

        state, positions, slots = self._state, zeros(torch.int32), zeros(torch.int64)
        plan = DevicePlan(
            positions=positions,
            slots=slots,
            context_lens=state.context_lens,
            block_tables=state.block_tables,
            rows=state.rows[size],
            work=self._work[size],
            tiles=None,
            block_m=0,
        )
        tokens = zeros(torch.int32)
        return _DecodeBuffers(size, zeros(torch.int32), positions, slots, tokens, plan)
