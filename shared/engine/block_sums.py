"""Sums of blocks' bytes, on whatever device the pool is on; what digests are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from shared.engine.kv_cache import KvCache
from shared.kv.digest import Uint64Array, block_sums

MOST_AT_ONCE = 1024
"""Blocks that one launch sums."""


class BlockSums(Protocol):
    """Used by one thread only."""

    def __call__(self, block_ids: Sequence[int], group: int = 0) -> Uint64Array:
        """[n, num_kv_heads] uint64 of blocks that nothing writes to; waits for the result."""


class HostBlockSums:
    """The torch reference."""

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache

    def __call__(self, block_ids: Sequence[int], group: int = 0) -> Uint64Array:
        return block_sums(self._cache.block_words(block_ids, group))


class DeviceBlockSums:
    """The kernel, on a stream of its own: it does not wait for the engine's step in flight, whose
    blocks are others. Of high priority, so that it gets its share of a busy GPU at once."""

    def __init__(self, cache: KvCache) -> None:
        self._words = [
            cache.memory.view(torch.int32).view(cache.num_blocks + 1, group.spec.num_kv_heads, -1)
            for group in cache.groups
        ]
        self._device = cache.memory.device
        self._stream = torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]
        most_heads = max(group.spec.num_kv_heads for group in cache.groups)
        self._ids = torch.zeros(MOST_AT_ONCE, dtype=torch.int32, pin_memory=True)
        self._sums = torch.zeros(MOST_AT_ONCE * most_heads, dtype=torch.int64, pin_memory=True)

    def __call__(self, block_ids: Sequence[int], group: int = 0) -> Uint64Array:
        parts = [
            self._sum(block_ids[start : start + MOST_AT_ONCE], self._words[group])
            for start in range(0, len(block_ids), MOST_AT_ONCE)
        ]
        return np.concatenate([self._none(group), *parts]) if len(parts) != 1 else parts[0]

    def _none(self, group: int) -> Uint64Array:
        return np.empty((0, self._words[group].shape[1]), np.uint64)

    def _sum(self, block_ids: Sequence[int], words: torch.Tensor) -> Uint64Array:
        from kernels.block_digest import block_sums as sums_of_blocks

        num_blocks = len(block_ids)
        self._ids[:num_blocks].numpy()[:] = block_ids
        host = self._sums[: num_blocks * words.shape[1]].view(num_blocks, -1)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            # What the caller wrote to a block just now, on the default stream, comes first.
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            ids = self._ids[:num_blocks].to(self._device, non_blocking=True)
            host.copy_(sums_of_blocks(words, ids), non_blocking=True)
            self._stream.synchronize()
        return host.numpy().view(np.uint64).copy()
