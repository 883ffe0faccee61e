"""Sums of blocks' bytes, on whatever device the pool is on; what digests are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from shared.engine.kv_cache import KvCache
from shared.kv.digest import Uint64Array, block_sums


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
        self._stream = torch.cuda.Stream(cache.memory.device, priority=-1)

    def __call__(self, block_ids: Sequence[int], group: int = 0) -> Uint64Array:
        from kernels.block_digest import block_sums as sums_of_blocks

        words = self._words[group]
        ids = torch.from_numpy(np.array(block_ids, np.int32))
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            # What the caller wrote to a block just now, on the default stream, comes first.
            self._stream.wait_stream(torch.cuda.default_stream(words.device))
            sums = sums_of_blocks(words, ids.pin_memory().to(words.device, non_blocking=True))
            return sums.cpu().numpy().view(np.uint64)
