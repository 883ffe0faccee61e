"""Caches of two groups, one of which has a window, without a model."""

from __future__ import annotations

import torch

from baton.shared.engine.kv_cache import KvCache
from baton.shared.kv.arrangement import Arrangement
from baton.shared.kv.cache_spec import CacheGroup, Full, Sliding
from baton.shared.kv.capacity import Capacity, GroupShare
from baton.shared.kv.pools import Pools
from tests.unit.worker.conftest import BLOCK_SIZE

FULL, WINDOWED = 0, 1
"""The cache groups; a token at the beginning of a block reads three blocks of the second."""
GROUPS = (
    CacheGroup(Full(2, 8), (0,)),
    CacheGroup(Sliding(3, 8, 2 * BLOCK_SIZE + 2), (1, 2)),
)
MOST_WINDOWED = 5
"""Blocks of the windowed group that a sequence holds at once."""


def make_two_groups(num_full: int, num_windowed: int) -> tuple[Pools, KvCache]:
    """With pools of their own: their blocks are of unequal sizes."""
    sizes = tuple(each.block_bytes(BLOCK_SIZE, torch.float32.itemsize) for each in GROUPS)
    num_blocks = (num_full, num_windowed)
    arrangement = Arrangement(GROUPS, (0, 1), sizes, 0.0)
    shares = (GroupShare(0), GroupShare(1, MOST_WINDOWED))
    cache = KvCache(arrangement, num_blocks, BLOCK_SIZE, torch.float32)
    cache.memory.random_(0, 100)
    return Pools(GROUPS, Capacity(BLOCK_SIZE, num_blocks, shares, 4096)), cache
