"""Steps prepared on the host, with numpy, and computed by the torch reference at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baton.kernels import reference
from baton.kernels.cpu_attention import plan_fused_attention
from baton.kernels.reference import AttentionPlan
from baton.kernels.reference_masks import apply_token_masks
from baton.kernels.state_plan import StatePlan
from baton.shared.engine import determinism
from baton.shared.engine.batch import (
    NOT_STORED,
    Batch,
    BatchColumns,
    BatchRow,
    Ints,
    RowHandle,
)
from baton.shared.engine.executor import Copied, Model, StepCounts, Tapped, Wanted
from baton.shared.engine.kv_cache import KvCache, SlotCopy
from baton.shared.engine.logprobs import (
    log_probabilities,
    packed_logprobs,
    rows_at_once,
    unpacked_logprobs,
)
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.sampler import sample_tokens
from baton.shared.engine.shaping import History, Shaping, apply_shaping
from baton.shared.kv.cache_spec import window_of
from baton.shared.kv.drawn import Drawn, TokenLogprobs, drawn_of, with_logprobs
from baton.shared.sampling import SamplingParams
from baton.shared.token_masks import TokenMasks


@dataclass(frozen=True, slots=True)
class DoneStep:
    """A step whose tokens are known."""

    drawn: list[Sequence[Drawn]]
    of_prompts: Mapping[int, Sequence[TokenLogprobs | None]] = field(default_factory=dict)
    """By row that asked."""
    told: Mapping[int, Tensor] = field(default_factory=dict)
    """By row, hidden states, where they are told."""

    def result(self) -> list[Sequence[Drawn]]:
        return self.drawn

    def prompt_logprobs(self, row: int) -> Sequence[TokenLogprobs | None]:
        return self.of_prompts[row]

    def taps(self, row: int) -> Tensor | None:
        return self.told.get(row)


@dataclass(frozen=True, slots=True)
class HostBegun:
    """A step whose logits are known."""

    rows: Sequence[BatchRow]
    """As the batch has them."""
    finish: Callable[[], DoneStep]

    @torch.inference_mode()
    def draw(self, masks: Mapping[int, TokenMasks]) -> DoneStep:
        for row, of_row in masks.items():
            self.rows[row].masks = of_row
        return self.finish()


class HostExecutor:
    def __init__(
        self,
        model: Model,
        kv_cache: KvCache,
        device: torch.device,
        *,
        num_heads: int,
        vocab_size: int,
        max_model_len: int,
        min_rows: int,
        min_linear_rows: int = determinism.MIN_LINEAR_ROWS,
        fuses_attention: bool = False,
        eos_token_ids: Sequence[int] = (),
        tapped: Tapped | None = None,
    ) -> None:
        """`min_rows`: attention's matrix products get at least as many rows; `min_linear_rows`:
        all others do. `fuses_attention`: over keys and values it takes kernels/cpu_attention.py.
        `tapped`: hidden states that steps tell."""
        self.kv_cache = kv_cache
        self.num_prompt_steps = StepCounts()
        self._model = model
        self._device = device
        self._num_heads = num_heads
        self._max_model_len = max_model_len
        self._min_rows = min_rows
        self._min_linear_rows = min_linear_rows
        # Over keys and values as they are: codes are widened by the plain form.
        are_plain = all(
            cache.dtype == kv_cache.dtype for cache in kv_cache.caches if isinstance(cache, Tensor)
        )
        self._fuses_attention = fuses_attention and are_plain
        self._eos_token_ids = eos_token_ids
        self._tapped = tapped
        self._rows_at_once = rows_at_once(vocab_size)
        self._slot_groups = [
            number for number, group in enumerate(kv_cache.groups) if not group.spec.grows
        ]

    def open_row(
        self, sampling: SamplingParams, sample_index: int, history: History | None = None
    ) -> RowHandle:
        shaping = Shaping.of(sampling, history, self._eos_token_ids)
        return RowHandle(0, sampling, sample_index, shaping)

    def close_row(self, handle: RowHandle) -> None:
        """Nothing is kept here but what is in the handle."""

    @property
    def num_free_rows(self) -> int:
        return 1 << 20

    def launch(self, batch: Batch) -> DoneStep:
        return self.begin(batch).draw({})

    def begin(self, batch: Batch) -> HostBegun:
        batch = Batch([_placed(row) for row in batch.rows])
        columns = self._columns(batch)
        rows = [batch.rows[i] for i in columns.order]
        # A token behind the last one that is known, and behind each draft.
        drawing = [
            (i, offset)
            for i, row in enumerate(rows)
            if row.sampling is not None
            for offset in range(row.num_known - 1, row.num_tokens)
        ]
        wanted = [int(columns.query_start[i]) + at for i, at in drawing]
        asking = [i for i, row in enumerate(rows) if row.prompt_logprobs is not None]
        inputs = self._inputs(columns, rows)
        plans = self._plan(columns)
        hidden = self._hidden_states(columns, plans, None if asking else wanted, inputs)
        told = self._told(columns, inputs)
        of_prompts: dict[int, Sequence[TokenLogprobs | None]] = {}
        for i in asking:
            first = int(columns.query_start[i])
            of_prompts[columns.order[i]] = self._prompt_logprobs(hidden, first, rows[i])
        logits: Tensor | None = None
        if drawing:
            at_them = self._at(hidden, wanted) if asking else hidden
            logits = self._logits(at_them, len(wanted))

        def finish() -> DoneStep:
            drawn = [] if logits is None else self._draw(logits, rows, drawing)
            by_row: dict[int, list[Drawn]] = {}
            for (i, _), each in zip(drawing, drawn, strict=True):
                by_row.setdefault(i, []).append(each)
            result: list[Sequence[Drawn]] = [[] for _ in rows]
            for i, of_row in by_row.items():
                result[columns.order[i]] = self._stands(rows[i], of_row)
            self._settle(plans, rows, [result[index] for index in columns.order])
            return DoneStep(result, of_prompts, told)

        return HostBegun(batch.rows, finish)

    def _draw(
        self, logits: Tensor, rows: Sequence[BatchRow], drawing: Sequence[tuple[int, int]]
    ) -> list[Drawn]:
        """`drawing`: (row, which of its tokens) of each row of logits."""
        params = [sampling for i, _ in drawing if (sampling := rows[i].sampling) is not None]
        asking = [place for place, each in enumerate(params) if each.logprobs is not None]
        # Of the logits as the model left them.
        logprobs = log_probabilities(logits[asking]) if asking else None
        self._shape(logits, rows, drawing)
        _apply_masks(logits, [rows[i] for i, _ in drawing])
        token_ids = sample_tokens(
            logits,
            params,
            [rows[i].sample_index for i, _ in drawing],
            [rows[i].position + rows[i].shift + offset + 1 for i, offset in drawing],
        )
        drawn = [drawn_of(token_id) for token_id in token_ids]
        if logprobs is not None:
            of_them = torch.tensor([token_ids[place] for place in asking])
            packed = packed_logprobs(logprobs, of_them.to(self._device)).cpu().numpy()
            told = unpacked_logprobs(packed, [params[place].logprobs or 0 for place in asking])
            for place, each in zip(asking, told, strict=True):
                drawn[place] = with_logprobs(drawn[place], each)
        return drawn

    def _shape(
        self, logits: Tensor, rows: Sequence[BatchRow], drawing: Sequence[tuple[int, int]]
    ) -> None:
        """Changes the logits of rows that ask for it. `drawing`: (row, which of its tokens)."""
        shapings = [
            self._shaping_alone(row) if row.handle is None else row.handle.shaping for row in rows
        ]
        if not any(shapings):
            return
        for place, (i, offset) in enumerate(drawing):
            row, shaping = rows[i], shapings[i]
            if shaping is not None:
                known_to = row.position + row.shift + row.num_known
                drafts = row.draft_ids[: offset + 1 - row.num_known]
                apply_shaping(logits[place], shaping, known_to, drafts)

    def _shaping_alone(self, row: BatchRow) -> Shaping | None:
        return Shaping.of(row.sampling, row.history, self._eos_token_ids)

    def _stands(self, row: BatchRow, drawn: Sequence[Drawn]) -> Sequence[Drawn]:
        """Of what was drawn behind a row's token and its drafts, that whose draft stands."""
        standing = 0
        while standing < len(row.draft_ids) and drawn[standing].token_id == row.draft_ids[standing]:
            standing += 1
        if row.handle is not None:
            row.handle.drawn_at = row.position + row.num_known + standing
            row.handle.drawn_token = drawn[standing].token_id
        return drawn[: standing + 1]

    def _settle(
        self,
        plans: Sequence[AttentionPlan | StatePlan],
        rows: Sequence[BatchRow],
        drawn: Sequence[Sequence[Drawn]],
    ) -> None:
        """States go on to the last draft that stands. `drawn`: by row, what does."""
        pairs = zip(rows, drawn, strict=True)
        standing = [len(each) - 1 if row.draft_ids else 0 for row, each in pairs]
        for plan in plans:
            if isinstance(plan, StatePlan):
                plan.settle(np.array(standing, np.int64))

    def _prompt_logprobs(
        self, hidden: Tensor, first: int, row: BatchRow
    ) -> Sequence[TokenLogprobs | None]:
        """`hidden`: of all of the step's tokens; `first`: the row's first among them."""
        wanted, most = row.prompt_logprobs, self._rows_at_once
        assert wanted is not None
        told: list[TokenLogprobs | None] = []
        for start in range(0, len(wanted.token_ids), most):
            token_ids = torch.tensor(wanted.token_ids[start : start + most]).to(self._device)
            places = range(len(token_ids))
            at_them = self._at(hidden, [first + wanted.first + start + place for place in places])
            logprobs = log_probabilities(self._logits(at_them, len(token_ids)))
            packed = packed_logprobs(logprobs, token_ids).cpu().numpy()
            told += unpacked_logprobs(packed, [wanted.num_top] * len(token_ids))
        return told

    def copy_slots(self, copies: Sequence[SlotCopy]) -> Copied:
        self.kv_cache.copy_slots(copies)
        return Copied()

    def computing(self, inputs: Sequence[Tensor]) -> AbstractContextManager[object]:
        return nullcontext()

    def logits(self, batch: Batch) -> Tensor:
        columns = self._columns(batch)
        place_of = {row: place for place, row in enumerate(columns.order)}
        wanted = [
            int(columns.query_start[place_of[index] + 1]) - before
            for index, row in enumerate(batch.rows)
            for before in range(row.num_logits, 0, -1)
        ]
        inputs = self._inputs(columns, [batch.rows[i] for i in columns.order])
        plans = self._plan(columns)
        return self._logits(self._hidden_states(columns, plans, wanted, inputs), len(wanted))

    def _inputs(self, columns: BatchColumns, rows: Sequence[BatchRow]) -> dict[str, Any]:
        """What a model gets, and fills, beside its tokens. `rows`: in the columns' order."""
        if self._tapped is None:
            return {}
        num_tokens = max(len(columns.input_ids), self._min_linear_rows)
        inputs = self._tapped.make_inputs(num_tokens, self._device)
        features = [row.features for row in rows if row.features is not None]
        if features:
            torch.cat(features, out=inputs["features"][: len(columns.input_ids)])
        return inputs

    def _told(self, columns: BatchColumns, inputs: Mapping[str, Any]) -> dict[int, Tensor]:
        """By row of the batch, its tokens' hidden states."""
        if self._tapped is None:
            return {}
        taps = inputs["taps"].out.flatten(1)
        starts = columns.query_start.tolist()
        return {
            index: taps[starts[place] : starts[place + 1]]
            for place, index in enumerate(columns.order)
        }

    def _hidden_states(
        self,
        columns: BatchColumns,
        plans: Sequence[AttentionPlan | StatePlan],
        tokens: Sequence[int] | None,
        inputs: Mapping[str, Any],
    ) -> Tensor:
        """Computes the step → [len(tokens) and padding, hidden] at these of its tokens; None: at
        all of them. `inputs`: as `_inputs` has them."""
        wanted: Wanted | None = None
        all_go = self._tapped is not None and self._tapped.to_the_end
        if tokens is not None and len(tokens) < len(columns.input_ids) and not all_go:
            ids = np.array(tokens, np.int64)
            alone = self._plan(_alone(columns, ids)) if tokens else ()
            wanted = self._padded(ids) if tokens else torch.from_numpy(ids), alone
        hidden = self._model.hidden_states(
            self._padded(columns.input_ids),
            self._padded(columns.positions),
            self.kv_cache.caches,
            plans,
            wanted,
            **inputs,
        )
        if tokens is None or wanted is not None:
            return hidden
        return self._at(hidden, tokens) if tokens else hidden[:0]

    def _at(self, hidden: Tensor, tokens: Sequence[int]) -> Tensor:
        """Of all of a step's tokens these → [len(tokens) and padding, hidden]."""
        return hidden.index_select(0, self._padded(np.array(tokens, np.int64)))

    def _logits(self, hidden: Tensor, num_tokens: int) -> Tensor:
        """float32 [num_tokens, vocab] of `_hidden_states`."""
        return self._model.logits(hidden)[:num_tokens].float()

    def _plan(self, columns: BatchColumns) -> list[AttentionPlan | StatePlan]:
        """By cache group."""
        return [
            self._plan_states(columns, group)
            if group in self._slot_groups
            else self._plan_attention(columns, group)
            for group in range(len(self.kv_cache.groups))
        ]

    def _plan_attention(self, columns: BatchColumns, group: int) -> AttentionPlan:
        cache = self.kv_cache.caches[group]
        assert isinstance(cache, Tensor)
        step = (
            columns.query_start,
            columns.context_lens,
            columns.block_tables[group],
            columns.slot_mapping[group],
            cache,
        )
        num_heads, window = self._num_heads, window_of(self.kv_cache.groups[group].spec)
        if self._fuses_attention:
            return plan_fused_attention(*step, num_heads=num_heads, window=window)
        return reference.plan_attention(
            *step,
            num_heads=num_heads,
            min_rows=self._min_rows,
            window=window,
            dtype=self.kv_cache.dtype,
        )

    def _plan_states(self, columns: BatchColumns, group: int) -> StatePlan:
        return StatePlan(
            columns.query_start,
            columns.positions[columns.query_start[:-1]],
            columns.block_tables[group][:, 0],
            columns.kept[group] if columns.kept else (),
            columns.num_drafts,
        )

    def _padded(self, column: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        num_missing = self._min_linear_rows - len(column)
        if num_missing > 0:
            # With copies of the first token, which no layer tells from it: experts that it does not
            # have are not read for them.
            column = np.concatenate((column, np.full(num_missing, column[0])))
        return torch.from_numpy(column).to(self._device, non_blocking=True)

    def _columns(self, batch: Batch) -> BatchColumns:
        columns = batch.columns(self.kv_cache.block_size, self._slot_groups)
        longest = int(columns.context_lens.max())
        if longest > self._max_model_len:
            raise ValueError(f"a row of {longest} tokens exceeds max_model_len")
        if len(columns.block_tables) != len(self.kv_cache.groups):
            raise ValueError(f"rows need {len(self.kv_cache.groups)} block tables")
        for group, table in enumerate(columns.block_tables):
            num_blocks, slots = self.kv_cache.pool_of(group).num_blocks, columns.slot_mapping[group]
            is_wrong = ((slots < 0) & (slots != NOT_STORED)).any()
            if is_wrong or int(table.max()) >= num_blocks:
                raise ValueError("a block table names a block that does not exist")
        return columns


def fuses_attention(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """On a CPU in 16 bits, where no layer has what that form does not know."""
    if dtype == torch.float32 or device.type != "cpu" or config.style.has_sinks:
        return False
    return not any(layer.soft_cap or layer.latent for layer in config.attentions)


def _apply_masks(logits: Tensor, drawing: Sequence[BatchRow]) -> None:
    """`drawing`: the row of each of the logits; those of a row stand together."""
    masked = [row for row in drawing if row.masks is not None]
    if not masked:
        return
    is_masked = np.array([row.masks is not None for row in drawing])
    masks = np.concatenate([next(of_row).masks for _, of_row in groupby(masked, id)])
    places = np.where(is_masked, np.cumsum(is_masked) - 1, -1)
    apply_token_masks(
        logits,
        torch.from_numpy(places).to(logits.device),
        torch.from_numpy(masks.view(np.int32)).to(logits.device),
    )


def _alone(columns: BatchColumns, tokens: Ints) -> BatchColumns:
    """Some of the tokens, each as a row of its own."""
    row = np.searchsorted(columns.query_start, tokens, side="right") - 1
    positions = columns.positions[tokens]
    return BatchColumns(
        order=[],
        input_ids=columns.input_ids[tokens],
        positions=positions,
        query_start=np.arange(len(tokens) + 1),
        context_lens=positions + 1,
        block_tables=[table[row] for table in columns.block_tables],
        slot_mapping=[slots[tokens] for slots in columns.slot_mapping],
    )


def _placed(row: BatchRow) -> BatchRow:
    """The row at the position where it really is, which its caller may not have known."""
    handle = row.handle
    if row.token_ids is not None or handle is None or not 0 <= handle.drawn_at < row.position:
        return row
    return replace(row, position=handle.drawn_at)
