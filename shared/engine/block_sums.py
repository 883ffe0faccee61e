"""Sums of blocks' bytes, on whatever device the pool is on; what digests are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch

from baton.shared.engine.executor import BegunStep, Copied, Step
from baton.shared.engine.kv_cache import KvCache
from baton.shared.kv.digest import Uint64Array, block_sums

MOST_AT_ONCE = 1024
"""Blocks that one launch sums."""

Writes = Step | BegunStep | Copied

TakeSums = Callable[[], Uint64Array]
"""Waits for sums that were started → [n, num_pieces] uint64. To be called once."""


class BlockSums(Protocol):
    """Used by one thread only."""

    def __call__(self, block_ids: Sequence[int], group: int = 0) -> Uint64Array:
        """[n, num_pieces] uint64 of blocks that nothing writes to; waits for the result."""

    def start(
        self, block_ids: Sequence[int], group: int = 0, *, behind: Writes | None = None
    ) -> TakeSums:
        """The same, waiting for nothing.

        `behind`: what may still write to the blocks: a step that was begun or launched, whose
        result is taken before the sums are, or a copy of slots. Nothing else writes to them until
        then.
        """


class HostBlockSums:
    """The torch reference."""

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache

    def __call__(self, block_ids: Sequence[int], group: int = 0) -> Uint64Array:
        return block_sums(self._cache.block_words(block_ids, group))

    def start(
        self, block_ids: Sequence[int], group: int = 0, *, behind: Writes | None = None
    ) -> TakeSums:
        if behind is not None:
            return partial(self, tuple(block_ids), group)
        sums = self(block_ids, group)
        return lambda: sums


class DeviceBlockSums:
    """The kernel, on a stream of its own: it does not wait for the engine's step in flight, whose
    blocks are others. Of high priority, so that it gets its share of a busy GPU at once."""

    def __init__(self, cache: KvCache) -> None:
        self._words = [cache.words(group) for group in range(len(cache.groups))]
        self._device = cache.memory.device
        self._stream = torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]

    def __call__(self, block_ids: Sequence[int], group: int = 0) -> Uint64Array:
        return self.start(block_ids, group)()

    def start(
        self, block_ids: Sequence[int], group: int = 0, *, behind: Writes | None = None
    ) -> TakeSums:
        from baton.kernels.block_digest import block_sums as sums_of_blocks

        words, num_blocks = self._words[group], len(block_ids)
        # Pinned memory that torch keeps for the next call, and gives out again after the copies.
        host_ids = torch.empty(num_blocks, dtype=torch.int32, pin_memory=True)
        host_ids.numpy()[:] = block_ids
        host = torch.empty(num_blocks, words.shape[1], dtype=torch.int64, pin_memory=True)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            # What the caller wrote to a block just now, on the default stream, comes first.
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            if behind is not None:
                self._stream.wait_event(_end_of(behind))
            ids = host_ids.to(self._device, non_blocking=True)
            for first in range(0, num_blocks, MOST_AT_ONCE):
                part = slice(first, first + MOST_AT_ONCE)
                host[part].copy_(sums_of_blocks(words, ids[part]), non_blocking=True)
            done = self._stream.record_event()

        def take() -> Uint64Array:
            done.synchronize()
            sums: Uint64Array = host.numpy().view(np.uint64).copy()
            return sums

        return take


def _end_of(step: Writes) -> torch.cuda.Event:
    """When all its blocks are written."""
    from baton.shared.engine.device_step import DeviceBegun, DeviceStep

    if isinstance(step, DeviceStep) and step.done is not None:
        return step.done
    if isinstance(step, DeviceBegun) and step.computed is not None:
        return step.computed
    if isinstance(step, Copied) and step.done is not None:
        return step.done
    raise TypeError(f"{type(step).__name__} is no step of this device")
