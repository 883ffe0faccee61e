"""How cache groups share memory: one pool for all, or a pool each, whichever wastes less.

Groups whose blocks are equally large share a pool, and what one does not need another takes. To
make blocks equally large, layers with equal specs may be cut into several groups, and blocks padded
by layers that nobody uses: that wastes the padding. Pools of their own waste what lies idle in one
pool while another is full: they are cut for sequences of `max_model_len`, and shorter ones need
other shares. Both are reckoned over sequences of 256 tokens, twice that, and so on. Pure.

Groups of states have pools of slots, a slot for each sequence at once; they come last, and count
for nothing where the others are arranged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from baton.shared.kv.cache_spec import CacheGroup, CacheSpec, cache_groups
from baton.shared.kv.capacity import GroupShare

_SHORTEST_TOKENS = 256
_MOST_GROUPS = 8
"""Every group costs host time in each step: more of them are not made."""
_GROUP_COST = 0.005
"""Share of memory that one group more must save."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Cache groups and their pools."""

    groups: tuple[CacheGroup, ...]
    pools: tuple[int, ...]
    """By group: its pool."""
    block_bytes: tuple[int, ...]
    """By pool."""
    waste: float
    """Share of the memory that is padding or idle, on average over lengths."""

    @property
    def num_pools(self) -> int:
        return len(self.block_bytes)

    @property
    def slot_pools(self) -> list[int]:
        """Those that hold states, a slot for each sequence."""
        return [
            pool
            for group, pool in zip(self.groups, self.pools, strict=True)
            if not group.spec.grows
        ]

    def shares(self, block_size: int, ahead_tokens: int) -> list[GroupShare]:
        """By group. ahead_tokens: as for `most_blocks`."""
        return [
            GroupShare(pool, most_blocks(group, block_size, ahead_tokens))
            for group, pool in zip(self.groups, self.pools, strict=True)
        ]

    def describe(self) -> str:
        """One line for the log."""
        num_pools = self.num_pools - len(self.slot_pools)
        num_groups = len(self.groups) - len(self.slot_pools)
        slots = sum(group.constant_bytes for group in self.groups)
        states = [f"states of {slots} bytes for each sequence"] if slots else []
        if num_groups == 0:
            return states[0]
        if num_groups == 1:
            return ", ".join(["one cache group", *states])
        how = "share one pool" if num_pools == 1 else "have pools of their own"
        return ", ".join([f"{num_groups} cache groups {how}, {self.waste:.1%} wasted", *states])


def arrange(
    specs: Sequence[CacheSpec | None],
    *,
    block_size: int,
    itemsize: int,
    max_model_len: int,
    ahead_tokens: int,
) -> Arrangement:
    """The arrangement that wastes least, for layers with these specs.

    itemsize: bytes of an element. ahead_tokens: as for `most_blocks`.
    """
    groups = cache_groups(specs)
    growing = [group for group in groups if group.spec.grows]
    states = [group for group in groups if not group.spec.grows]
    found = Arrangement((), (), (), 0.0)
    if growing:
        found = _arrange_growing(
            growing,
            block_size=block_size,
            itemsize=itemsize,
            max_model_len=max_model_len,
            ahead_tokens=ahead_tokens,
        )
    return replace(
        found,
        groups=(*found.groups, *states),
        pools=(*found.pools, *range(found.num_pools, found.num_pools + len(states))),
        block_bytes=(*found.block_bytes, *(group.constant_bytes for group in states)),
    )


def _arrange_growing(
    groups: Sequence[CacheGroup],
    *,
    block_size: int,
    itemsize: int,
    max_model_len: int,
    ahead_tokens: int,
) -> Arrangement:
    """Of groups whose blocks are of tokens."""
    plain = tuple(groups)
    sizes = [group.block_bytes(block_size, itemsize) for group in plain]
    if len(set(sizes)) == 1:
        return Arrangement(plain, (0,) * len(plain), (sizes[0],), 0.0)
    lengths = [max_model_len]
    while lengths[-1] >= 2 * _SHORTEST_TOKENS:
        lengths.append(lengths[-1] // 2)

    def counts(groups: Sequence[CacheGroup], length: int) -> list[int]:
        most = [most_blocks(group, block_size, ahead_tokens) for group in groups]
        return [GroupShare(0, each).blocks_for(length, block_size) for each in most]

    own = Arrangement(plain, tuple(range(len(plain))), tuple(sizes), 0.0)
    longest = [n * size for n, size in zip(counts(plain, max_model_len), sizes, strict=True)]
    shares = [part / sum(longest) for part in longest]
    idle = [
        1 - _filled(shares, [n * size for n, size in zip(counts(plain, each), sizes, strict=True)])
        for each in lengths
    ]
    best = replace(own, waste=sum(idle) / len(idle))
    for equal in _equal_groups(plain, block_size, itemsize):
        size = equal[0].block_bytes(block_size, itemsize)
        padding = [
            group.num_padding_layers / (len(group.layer_ids) + group.num_padding_layers)
            for group in equal
        ]
        wasted = []
        for each in lengths:
            held = counts(equal, each)
            unused = sum(n * share for n, share in zip(held, padding, strict=True))
            wasted.append(unused / sum(held))
        shared = Arrangement(equal, (0,) * len(equal), (size,), sum(wasted) / len(wasted))
        if _cost(shared) < _cost(best):
            best = shared
    return best


def most_blocks(group: CacheGroup, block_size: int, ahead_tokens: int) -> int | None:
    """The most blocks that a sequence holds in a group: those that it reads, and room for
    `ahead_tokens` that are computed before any are given back. None: all."""
    if not group.spec.grows:
        return 1
    if group.spec.reads_everything:
        return None
    position = 1 << 40
    read = position - group.spec.first_read(position)
    # A stretch of tokens that begins anywhere in a block.
    return -(-(read + ahead_tokens - 1) // block_size) + 1


def _cost(arrangement: Arrangement) -> float:
    return arrangement.waste + _GROUP_COST * len(arrangement.groups)


def _filled(shares: Sequence[float], needs: Sequence[int]) -> float:
    """Share of the memory that is in use when one of the pools is full."""
    num_sequences = min(share / need for share, need in zip(shares, needs, strict=True))
    return num_sequences * sum(needs)


def _equal_groups(
    plain: Sequence[CacheGroup], block_size: int, itemsize: int
) -> list[tuple[CacheGroup, ...]]:
    """Ways of cutting and padding that make all blocks equally large."""
    one_layer = [
        replace(group, layer_ids=(0,)).block_bytes(block_size, itemsize) for group in plain
    ]
    unit = math.lcm(*one_layer)
    ways = []
    largest = max(size * len(group.layer_ids) for size, group in zip(one_layer, plain, strict=True))
    for num_bytes in range(unit, max(largest, unit) + unit, unit):
        groups: list[CacheGroup] = []
        for size, group in zip(one_layer, plain, strict=True):
            at_once = num_bytes // size
            for first in range(0, len(group.layer_ids), at_once):
                layer_ids = group.layer_ids[first : first + at_once]
                groups.append(CacheGroup(group.spec, layer_ids, at_once - len(layer_ids)))
        if len(groups) <= _MOST_GROUPS:
            ways.append(tuple(groups))
    return ways
