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

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from baton.shared.engine.batch import Batch, BatchRow, ChainRow, RowHandle
from baton.shared.engine.batch_state import aligned
from baton.shared.engine.chain_steps import ChainSteps
from baton.shared.engine.coming_guesses import ComingGuesses, DeviceChains, take_guesses
from baton.shared.engine.decode_steps import DecodeSteps
from baton.shared.engine.device_context import DeviceContext, padded
from baton.shared.engine.device_logprobs import Told, asking, tell_of_drawn
from baton.shared.engine.device_rows import DeviceRows
from baton.shared.engine.device_step import DeviceBegun, DeviceStep, Layout
from baton.shared.engine.executor import (
    ChainShape,
    Copied,
    HalvesModel,
    Model,
    StepCounts,
    Tapped,
)
from baton.shared.engine.graphs import Graphs
from baton.shared.engine.kv_cache import KvCache, SlotCopy
from baton.shared.engine.launched_steps import LaunchedSteps
from baton.shared.engine.prompt_steps import PromptSteps, sizes_up_to
from baton.shared.engine.shaping import History
from baton.shared.sampling import SamplingParams

_GREEDY = SamplingParams(temperature=0.0)


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
        tapped: Tapped | None = None,
        chains: ChainShape | None = None,
        captures_prompts: bool = False,
    ) -> None:
        """`num_drafts`: the most that a row may bring along; `tapped`: hidden states that steps
        tell; `chains`: of a model that guesses; `captures_prompts`: steps with prompt chunks can
        come from graphs."""
        self.kv_cache = kv_cache
        self._device = device
        self._context = context = DeviceContext(
            model,
            kv_cache,
            device,
            num_heads=num_heads,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            num_drafts=num_drafts,
            tapped=tapped,
            chains=chains,
        )
        self._rows = DeviceRows(
            context.state,
            num_blocks=[len(tensor) for tensor in kv_cache.tensors],
            num_slot_groups=self._context.num_slot_groups,
            block_size=kv_cache.block_size,
            max_model_len=max_model_len,
            num_drafts=num_drafts,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
        )
        self._decode = DecodeSteps(context)
        self._launched = LaunchedSteps(context, self._decode)
        self._prompts = self._make_prompt_steps(model) if captures_prompts else None
        self._chains = None if chains is None else ChainSteps(context, chains, self._decode.work)
        self.num_prompt_steps = StepCounts()
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
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
        return self._rows.open(sampling, sample_index, history)

    def close_row(self, handle: RowHandle) -> None:
        self._rows.close([handle])

    @property
    def num_free_rows(self) -> int:
        return self._rows.num_free

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
                self._rows.close(layout.scratch)
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

    def launch_chains(self, chains: Sequence[ChainRow]) -> DeviceChains:
        """Begins chains of guesses, all their steps. Raises as `launch` does."""
        assert self._chains is not None
        if self._has_begun:
            raise RuntimeError("the step before has not drawn yet")
        handles = [_handle_of(chain) for chain in chains]
        with self._stepping(Layout(handles)):
            self._check_number(len(chains))
            for chain in chains:
                self._chains.check(chain)
                self._rows.check(chain.row, chain.end)
            for chain, handle in zip(chains, handles, strict=True):
                self._rows.note_chain(chain, handle)
                for states in chain.states:
                    self._keep(states)
            guesses = self._chains.launch(chains, [handle.slot for handle in handles])
            # Those of the next chains go there, and nobody may have asked for these by then.
            guesses = guesses.clone()
            tokens = self._context.host.fetch_apart(guesses)
            num_guesses = [chain.num_guesses for chain in chains]
            return DeviceChains(num_guesses, guesses, tokens, self._event())

    def logits(self, batch: Batch) -> Tensor:
        with self._on_stream():
            layout = Layout()
            try:
                self._lay_out(batch, layout)
                num_wanted = [row.num_logits for row in batch.rows]
                hidden, *_ = self._launched.compute(batch, layout, num_wanted)
                logits = self._launched.head(hidden)
            finally:
                self._rows.distrust(layout.handles)
                self._rows.close(layout.scratch)
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
            captured = Graphs(self._stream) if graphs and self._stream is not None else None
            if self._chains is None:
                self._decode.capture(captured)
            else:
                # By themselves its decode steps are few: remainders of prompts.
                self._decode.capture(None)
                self._chains.capture(captured)
            self._launched.compile_plans()

    def capture_prompts(self, most_tokens: int, graphs: Graphs | None = None) -> None:
        """Captures graphs of steps with prompt chunks, of so many tokens at most, where the model
        allows it. `graphs`: what captures them, if not the device."""
        if self._prompts is None:
            return
        with self._on_stream():
            if graphs is None and self._stream is not None:
                graphs = Graphs(self._stream)
            if graphs is not None:
                self._prompts.capture(graphs, sizes_up_to(most_tokens))

    def _make_prompt_steps(self, model: Model) -> PromptSteps | None:
        """None: its steps with prompt chunks are launched."""
        context = self._context
        if not isinstance(model, HalvesModel):
            return None
        if context.tapped is not None and context.tapped.to_the_end:
            return None
        return PromptSteps(context, model, self._launched.drawn_work)

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
                self._rows.distrust(layout.handles)
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

    def copy_slots(self, copies: Sequence[SlotCopy]) -> Copied:
        with self._on_stream():
            self.kv_cache.copy_slots(copies)
            return Copied(self._event())

    def computing(self, inputs: Sequence[Tensor]) -> AbstractContextManager[object]:
        for each in inputs:
            self._keep(each)
        return self._on_stream()

    def _keep(self, made_elsewhere: Tensor) -> None:
        """Its memory is another's when this stream is done with it."""
        if self._stream is not None:
            made_elsewhere.record_stream(self._stream)

    def _lay_out(self, batch: Batch, layout: Layout) -> None:
        """Sorts rows into decode rows and chunks, and notes what the device does not know yet."""
        self._check_number(len(batch.rows))
        for row in batch.rows:
            self._rows.check(row)
        for index, row in enumerate(batch.rows):
            handle = row.handle
            if handle is None:
                handle = self.open_row(row.sampling or _GREEDY, row.sample_index, row.history)
                layout.scratch.append(handle)
            layout.handles.append(handle)
            if not row.is_chunk:
                layout.decode.append(index)
                if row.draft_ids:
                    layout.width = self._context.widths[-1]
            else:
                layout.chunks.append(index)
        for row, handle in zip(batch.rows, layout.handles, strict=True):
            self._rows.note(row, handle, has_drafts=layout.width > 1)
        self._take_guesses(batch, layout)
        if layout.decode:
            layout.size = padded(len(layout.decode), self._context.sizes)
            self._context.state.send_rows(
                layout.size, [layout.handles[i].slot for i in layout.decode]
            )

    def _take_guesses(self, batch: Batch, layout: Layout) -> None:
        """Those that the host does not know yet."""
        taking: dict[DeviceChains, list[tuple[int, ComingGuesses]]] = {}
        for row in layout.decode:
            guesses = batch.rows[row].draft_ids
            if isinstance(guesses, ComingGuesses):
                taking.setdefault(guesses.chains, []).append((layout.handles[row].slot, guesses))
        for chains, of_chains in taking.items():
            if self._stream is not None and chains.done is not None:
                self._stream.wait_event(chains.done)
            self._keep(chains.guesses)
            take_guesses(of_chains, self._context.state.draft_ids)

    def _check_number(self, num_rows: int) -> None:
        if not num_rows:
            raise ValueError("a batch needs rows")
        if num_rows > self._context.sizes[-1]:
            raise ValueError(f"a batch of {num_rows} rows exceeds {self._context.sizes[-1]}")

    def _begin_step(self, batch: Batch, layout: Layout) -> Callable[[], DeviceStep]:
        """Launches the forward pass; returns what launches the draw."""
        rows = batch.rows
        # Behind a row of one token, and behind each of its drafts, or behind a chunk's last token.
        num_wanted = [
            0 if row.sampling is None else 1 + len(row.draft_ids) if row.num_known == 1 else 1
            for row in rows
        ]
        if layout.chunks:
            hidden, draw = self._begin_prompts(batch, layout, num_wanted)
        else:
            hidden, draw = self._decode.begin(batch, layout, num_wanted)
        wanted = [row if row >= 0 and num_wanted[row] else -1 for row in layout.wanted]

        def finish() -> DeviceStep:
            self._context.draw.masks.send(rows, layout.wanted)
            results = draw()
            logprobs = self._tell_of_drawn(rows, wanted, hidden, results)
            if layout.width == 1:
                results = results[: len(wanted)]
            return self._fetch(batch, layout, results, wanted, logprobs)

        return finish

    def _begin_prompts(
        self, batch: Batch, layout: Layout, num_wanted: Sequence[int]
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """By a graph, if there is one for such a step."""
        if self._prompts is not None:
            begun = self._prompts.begin(batch, layout, num_wanted)
            if begun is not None:
                self.num_prompt_steps.captured += 1
                return begun
        self.num_prompt_steps.launched += 1
        return self._launched.begin(batch, layout, num_wanted)

    def _tell_of_drawn(
        self, rows: Sequence[BatchRow], wanted: Sequence[int], hidden: Tensor, results: Tensor
    ) -> Told | None:
        """Of the tokens that rows ask for; no kernel runs where none does."""
        if all(row.sampling is None or row.sampling.logprobs is None for row in rows):
            return None
        places, num_top = asking(wanted, rows)
        if not places:
            return None
        return tell_of_drawn(self._launched.head(hidden), places, num_top, results[: len(wanted)])

    def _fetch(
        self,
        batch: Batch,
        layout: Layout,
        results: Tensor,
        wanted: list[int],
        logprobs: Told | None,
    ) -> DeviceStep:
        host = self._context.host.fetch(results)
        told = self._told(batch, layout)
        done = self._event()
        drafted = []
        if layout.width > 1:
            counts = aligned(len(wanted))
            drafted = [
                (row, counts + place, layout.handles[row], len(batch.rows[row].draft_ids))
                for place, row in enumerate(layout.decode)
                if batch.rows[row].draft_ids
            ]
        return DeviceStep(
            wanted, len(batch.rows), host, done, drafted, logprobs, layout.of_prompts, told
        )

    def _told(self, batch: Batch, layout: Layout) -> dict[int, Tensor]:
        """By row, its tokens' hidden states; those of graphs' buffers are copied before the next
        step."""
        if layout.taps is None:
            return {}
        taps = layout.taps.clone() if layout.are_taps_shared else layout.taps
        starts = {row: place * layout.width for place, row in enumerate(layout.decode)}
        token = layout.first_of_chunks
        for row in layout.chunks:
            starts[row] = token
            token += batch.rows[row].num_tokens
        return {
            row: taps[start : start + batch.rows[row].num_tokens] for row, start in starts.items()
        }

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _handle_of(chain: ChainRow) -> RowHandle:
    assert chain.row.handle is not None
    return chain.row.handle
