"""ModelRunner: one step of a model over a batch. Knows nothing of RPC, Redis or scheduling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.engine import determinism
from shared.engine.batch import Batch, BatchColumns
from shared.engine.cache_spec import CacheGroup, cache_groups
from shared.engine.config import (
    DeviceError,
    EngineConfig,
    ModelError,
    load_model_config,
    resolve_max_model_len,
)
from shared.engine.kv_cache import KvCache, block_bytes
from shared.engine.models import llama
from shared.engine.operations import operations_for
from shared.engine.sampler import sample_tokens
from shared.engine.weights import Progress, ProgressReport, WeightFiles

_POOL_BYTES = 256 * 2**20
_MAX_POOL_BYTES = 2**30
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ModelRunner:
    """A loaded model with its KV cache.

    Attributes:
        determinism: 'exact' when a token's bits do not depend on the rest of the step, the
            boundaries of chunks, or block ids; else 'consistent'.
        numerics: what the bits depend on beside model and dtype; workers that differ here may draw
            different tokens although each is exact by itself.
        model_digest: hex SHA-256 over config.json and the weight files.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        pool_memory: Callable[[int], Tensor] | None = None,
        progress: Progress = lambda _: None,
    ) -> None:
        """Loads the model and allocates its block pool.

        The number of threads must be set before; no global state of torch is changed.

        Args:
            pool_memory: given a number of bytes, returns uint8 memory for the pool.
            progress: told, once a second, how far hashing and loading are.

        Raises:
            ModelError: the model, its weights or the configuration cannot be used.
        """
        self.model_config = load_model_config(config.model_dir)
        self.max_model_len = resolve_max_model_len(config, self.model_config)
        self.device = _device(config.device)
        self.dtype = _dtype(config.dtype, self.device)
        self.groups: tuple[CacheGroup, ...] = cache_groups(llama.cache_specs(self.model_config))
        self._ops = operations_for(self.device)

        weights = WeightFiles(config.model_dir)
        weights.check(llama.tensor_shapes(self.model_config), llama.is_ignored_tensor)
        num_weights = sum(math.prod(shape) for shape in weights.shapes.values())
        self.num_blocks = self._choose_num_blocks(config, num_weights * self.dtype.itemsize)
        self.model_digest = weights.digest(config.model_dir / "config.json", progress)
        self._model = self._load(weights, progress)
        weights.close()

        self.determinism, self._min_rows = self._measure_determinism()
        self.numerics = _numerics(self.device)
        shape = (self.groups, self.num_blocks, config.block_size, self.dtype)
        memory = pool_memory(KvCache.required_bytes(*shape)) if pool_memory else None
        self.kv_cache = KvCache(*shape, memory=memory, device=self.device)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> list[int | None]:
        """Computes a step → by row, the token that follows its last one; None where none is drawn.

        Raises:
            ValueError: a row is empty, too long, or names blocks that do not exist.
        """
        columns = batch.columns(self.kv_cache.block_size)
        hidden = self._hidden_states(columns)
        rows = [batch.rows[i] for i in columns.order]
        drawing = [i for i, row in enumerate(rows) if row.sampling is not None]
        result: list[int | None] = [None] * len(rows)
        if drawing:
            tokens = sample_tokens(
                self._ops,
                self._last_logits(hidden, columns, drawing),
                [sampling for row in rows if (sampling := row.sampling) is not None],
                [rows[i].sample_index for i in drawing],
                [rows[i].context_len for i in drawing],
            )
            for i, token in zip(drawing, tokens, strict=True):
                result[columns.order[i]] = token
        return result

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """Computes a step → float32 [rows, vocab], the logits at each row's last token."""
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
            self._ops.plan_step(
                columns.query_start,
                columns.context_lens,
                columns.block_tables[group],
                columns.slot_mapping[group],
                kv,
                num_heads=self.model_config.num_heads,
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
        return self._model.logits(hidden.index_select(0, self._padded(last)))[: len(last)]

    def _padded(self, column: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        num_missing = determinism.MIN_LINEAR_ROWS - len(column)
        if num_missing > 0:
            column = np.concatenate((column, np.zeros(num_missing, np.int64)))
        return torch.from_numpy(column).to(self.device, non_blocking=True)

    def _check(self, columns: BatchColumns) -> None:
        longest = int(columns.context_lens.max())
        if longest > self.max_model_len:
            raise ValueError(f"a row of {longest} tokens exceeds max_model_len")
        if len(columns.block_tables) != len(self.groups):
            raise ValueError(f"rows need {len(self.groups)} block tables")
        for table, slots in zip(columns.block_tables, columns.slot_mapping, strict=True):
            if int(table.max()) >= self.num_blocks or int(slots.min()) < 0:
                raise ValueError("a block table names a block that does not exist")

    def _load(self, weights: WeightFiles, progress: Progress) -> llama.Llama:
        report = ProgressReport(progress, "loading weights", len(weights.shapes))

        def load(name: str) -> Tensor:
            report.advance(1)
            return weights.tensor(name, self.dtype).to(self.device)

        with torch.inference_mode():
            return llama.Llama(
                self.model_config,
                load,
                self._ops,
                max_model_len=self.max_model_len,
                dtype=self.dtype,
                device=self.device,
            )

    def _measure_determinism(self) -> tuple[str, int]:
        """The class, and the fewest rows of attention's products."""
        if self.device.type != "cpu" or self.dtype != torch.float32:
            return "consistent", 1
        with torch.inference_mode():
            min_rows = determinism.min_attention_rows(self.model_config)
            if (
                min_rows is None
                or not determinism.linear_is_stable(self.model_config, self._ops)
                or not determinism.elementwise_is_stable()
            ):
                return "consistent", determinism.MIN_LINEAR_ROWS
        return "exact", min_rows

    def _choose_num_blocks(self, config: EngineConfig, weight_bytes: int) -> int:
        """The configured number of blocks, else what the machine can spare.

        On a CPU: four sequences of max_model_len or 256 MiB, whichever is more, but at most 1 GiB
        and half of what is free. On a GPU: 85 % of what is free beside the weights.

        Raises:
            ModelError: not even one sequence of max_model_len fits, or the configured number does
                not fit into memory.
        """
        per_block = block_bytes(self.groups, config.block_size, self.dtype)
        free_bytes = _free_bytes(self.device) - weight_bytes
        if config.num_blocks is not None:
            if config.num_blocks * per_block > free_bytes:
                raise ModelError(
                    f"num_blocks: {config.num_blocks} blocks of {per_block} bytes do not fit "
                    f"into the {max(0, free_bytes)} bytes that are free"
                )
            return config.num_blocks
        longest = -(-self.max_model_len // config.block_size)
        if self.device.type == "cuda":
            num_bytes = int(free_bytes * 0.85)
        else:
            wanted = max(4 * longest * per_block, _POOL_BYTES)
            num_bytes = min(wanted, _MAX_POOL_BYTES, free_bytes // 2)
        num_blocks = num_bytes // per_block
        if num_blocks < longest:
            raise ModelError(
                f"max_model_len: a sequence of {self.max_model_len} tokens needs {longest} blocks, "
                f"the pool would have {num_blocks}; set num_blocks or a lower max_model_len"
            )
        return num_blocks


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise DeviceError("device: cuda was asked for, but torch finds no CUDA device")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return _DTYPES[name]


def _numerics(device: torch.device) -> str:
    if device.type == "cuda":
        return f"torch {torch.__version__} {torch.cuda.get_device_name(device)}"
    return f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2 * _MAX_POOL_BYTES
