"""Steps planned on the host, with numpy, and computed by the torch reference at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baton.kernels import reference
from baton.shared.engine import determinism
from baton.shared.engine.batch import Batch, BatchColumns, RowHandle
from baton.shared.engine.kv_cache import KvCache
from baton.shared.engine.sampler import sample_tokens
from baton.shared.engine.steps import Model
from baton.shared.kv.sequence import SamplingParams


@dataclass(frozen=True, slots=True)
class DoneStep:
    """A step whose tokens are known."""

    tokens: list[int | None]

    def result(self) -> list[int | None]:
        return self.tokens


class HostSteps:
    def __init__(
        self,
        model: Model,
        kv_cache: KvCache,
        device: torch.device,
        *,
        num_heads: int,
        max_model_len: int,
        min_rows: int,
    ) -> None:
        """`min_rows`: attention's matrix products get at least as many rows."""
        self.kv_cache = kv_cache
        self._model = model
        self._device = device
        self._num_heads = num_heads
        self._max_model_len = max_model_len
        self._min_rows = min_rows

    def open_row(self, sampling: SamplingParams, sample_index: int) -> RowHandle:
        return RowHandle(0, sampling, sample_index)

    def close_row(self, handle: RowHandle) -> None:
        """Nothing is kept here but what is in the handle."""

    @property
    def num_free_rows(self) -> int:
        return 1 << 20

    def launch(self, batch: Batch) -> DoneStep:
        columns = batch.columns(self.kv_cache.block_size)
        hidden = self._hidden_states(columns)
        rows = [batch.rows[i] for i in columns.order]
        drawing = [i for i, row in enumerate(rows) if row.sampling is not None]
        result: list[int | None] = [None] * len(rows)
        if drawing:
            tokens = sample_tokens(
                self._last_logits(hidden, columns, drawing),
                [sampling for row in rows if (sampling := row.sampling) is not None],
                [rows[i].sample_index for i in drawing],
                [rows[i].context_len for i in drawing],
            )
            for i, token in zip(drawing, tokens, strict=True):
                result[columns.order[i]] = token
                handle = rows[i].handle
                if handle is not None:
                    handle.drawn_at, handle.drawn_token = rows[i].context_len, token
        return DoneStep(result)

    def logits(self, batch: Batch) -> Tensor:
        columns = batch.columns(self.kv_cache.block_size)
        hidden = self._hidden_states(columns)
        logits = self._last_logits(hidden, columns, range(len(columns.order)))
        result = torch.empty_like(logits)
        result[columns.order] = logits
        return result

    def _hidden_states(self, columns: BatchColumns) -> Tensor:
        """[at least T, hidden]; rows behind the step's tokens are padding."""
        self._check(columns)
        plans = [
            reference.plan_step(
                columns.query_start,
                columns.context_lens,
                columns.block_tables[group],
                columns.slot_mapping[group],
                kv,
                num_heads=self._num_heads,
                min_rows=self._min_rows,
            )
            for group, kv in enumerate(self.kv_cache.padded_tensors)
        ]
        return self._model.hidden_states(
            self._padded(columns.input_ids),
            self._padded(columns.positions),
            self.kv_cache.padded_tensors,
            plans,
        )

    def _last_logits(self, hidden: Tensor, columns: BatchColumns, rows: Sequence[int]) -> Tensor:
        """float32 [len(rows), vocab]."""
        last = columns.query_start[1:][list(rows)] - 1
        return self._model.logits(hidden.index_select(0, self._padded(last)))[: len(last)].float()

    def _padded(self, column: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        num_missing = determinism.MIN_LINEAR_ROWS - len(column)
        if num_missing > 0:
            column = np.concatenate((column, np.zeros(num_missing, np.int64)))
        return torch.from_numpy(column).to(self._device, non_blocking=True)

    def _check(self, columns: BatchColumns) -> None:
        longest = int(columns.context_lens.max())
        if longest > self._max_model_len:
            raise ValueError(f"a row of {longest} tokens exceeds max_model_len")
        if len(columns.block_tables) != len(self.kv_cache.groups):
            raise ValueError(f"rows need {len(self.kv_cache.groups)} block tables")
        for table, slots in zip(columns.block_tables, columns.slot_mapping, strict=True):
            if int(table.max()) >= self.kv_cache.num_blocks or int(slots.min()) < 0:
                raise ValueError("a block table names a block that does not exist")
