"""What a worker's memory becomes: blocks by pool, and the longest sequence that they hold. Pure.

The answer to "does it fit" is always that of the `Capacity` that the pools make: who admits
requests asks the same one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.shared.kv.arrangement import Arrangement, most_blocks
from baton.shared.kv.capacity import Capacity, GroupShare, blocks_by_pool, num_blocks_for

NumBlocks = tuple[int, ...]
"""By pool."""

_WINDOWED_PART = 2
_MOST_OF_ONE_GROUP = 4
"""Of a small pool, what a sequence holds in a windowed group is at most one part in so many; and
what it holds in all windowed groups of the pool, one in `_WINDOWED_PART`."""


@dataclass(frozen=True, slots=True)
class PoolSizes:
    """Sizes of the pools of one arrangement."""

    arrangement: Arrangement
    block_size: int
    """Tokens."""
    ahead_tokens: int
    """Computed before a windowed group gives blocks back; see `most_blocks`."""
    in_flight_tokens: int
    """The fewest of these that there may be: those of steps of single tokens."""
    max_num_seqs: int
    """Rows of a step: each has a slot, where states are kept."""
    num_checkpoints: int = 0
    """Slots beside those of the rows, for states that are kept for later prompts."""

    def blocks_for(self, num_tokens: int) -> list[int]:
        """By pool: what a sequence of so many tokens takes where nothing is scarce."""
        return blocks_by_pool(
            self.shares(), self.arrangement.num_pools, num_tokens, self.block_size
        )

    def shares(self) -> list[GroupShare]:
        """By group: what a sequence takes where nothing is scarce."""
        return self.arrangement.shares(self.block_size, self.ahead_tokens)

    def bytes_of(self, num_blocks: Sequence[int]) -> int:
        """num_blocks: by pool."""
        return sum(map(int.__mul__, num_blocks, self.arrangement.block_bytes))

    def of_bytes(self, num_bytes: int, num_tokens: int) -> NumBlocks:
        """All that so many bytes hold, shared out as sequences of `num_tokens` tokens need it."""
        # The zero block behind each pool's last one is a block too.
        usable_bytes = max(0, num_bytes - sum(self.arrangement.block_bytes))
        if not self.arrangement.slot_pools:
            return self._shared_out(usable_bytes, self.blocks_for(num_tokens))
        need = self._with_slots(self.blocks_for(num_tokens), 0)
        need_bytes = self.bytes_of(need)
        num_slots = self._num_slots(usable_bytes - need_bytes)
        if need_bytes:
            # Of memory that is shared, states take half at most.
            num_slots = min(num_slots, max(1, self._num_slots(usable_bytes // 2)))
        blocks = self._shared_out(usable_bytes - num_slots * self.slot_bytes, need)
        return self._with_slots(blocks, num_slots)

    def of_first(self, num_blocks: int, num_tokens: int, num_bytes: int = 0) -> NumBlocks:
        """So many in the first pool; the others follow as sequences of `num_tokens` tokens need
        it; and so many slots, one at least, as there is memory for in `num_bytes` beside them."""
        need = self.blocks_for(num_tokens)
        blocks = self._with_slots([-(-num_blocks * count // need[0]) for count in need], 0)
        return self._with_slots(blocks, max(1, self._num_slots(num_bytes - self.bytes_of(blocks))))

    @property
    def slot_bytes(self) -> int:
        """Of all the slots that a sequence has: one of each pool of them."""
        return sum(self.arrangement.block_bytes[pool] for pool in self.arrangement.slot_pools)

    def _shared_out(self, num_bytes: int, need: Sequence[int]) -> NumBlocks:
        """So many times `need`, by pool, as the bytes hold."""
        need_bytes = max(1, self.bytes_of(need))
        return tuple(num_bytes * count // need_bytes for count in need)

    @property
    def most_slots(self) -> int:
        """Of each pool of slots."""
        return self.max_num_seqs + self.num_checkpoints

    def rows_of(self, num_slots: int, num_asked: int = 0) -> int:
        """Rows of a step for which so many slots do: where they are too few, checkpoints keep
        their share of them, and all `num_asked` that were asked for by number."""
        rows = min(num_slots * self.max_num_seqs // self.most_slots, num_slots - num_asked)
        return min(self.max_num_seqs, max(1, rows))

    def _num_slots(self, num_bytes: int) -> int:
        """Of each pool of slots, at most one for each row and each checkpoint."""
        if not self.slot_bytes:
            return 0
        return min(self.most_slots, max(0, num_bytes) // self.slot_bytes)

    def _with_slots(self, num_blocks: Sequence[int], num_slots: int) -> NumBlocks:
        """num_blocks: by pool; those of slots do not count."""
        return tuple(
            num_slots if pool in self.arrangement.slot_pools else count
            for pool, count in enumerate(num_blocks)
        )

    def capacity(self, num_blocks: NumBlocks, max_model_len: int) -> Capacity:
        """A windowed group's share of a small pool is cut: prompts go on in smaller chunks then."""
        shares = []
        of_groups = list(zip(self.arrangement.groups, self.shares(), strict=True))
        windowed = Counter(
            share.pool
            for group, share in of_groups
            if group.spec.grows and share.max_blocks is not None
        )
        for group, share in of_groups:
            if group.spec.grows and share.max_blocks is not None:
                parts = max(_MOST_OF_ONE_GROUP, _WINDOWED_PART * windowed[share.pool])
                most = min(share.max_blocks, num_blocks[share.pool] // parts)
                # Enough to go on: a block, and the tokens in flight.
                least = most_blocks(group, self.block_size, self.in_flight_tokens + self.block_size)
                share = GroupShare(share.pool, max(least or 0, most))
            shares.append(share)
        return Capacity(
            self.block_size,
            num_blocks,
            tuple(shares),
            max_model_len,
            self.arrangement.block_bytes,
        )

    def longest(self, pools_for: Callable[[int], NumBlocks | None], limit: int) -> int:
        """Tokens of the longest sequence, at most `limit`, that its own pools hold; 0: none.

        pools_for: given a sequence's tokens, the pools that there would be; None: there is no
            memory for these.
        """
        # Whole blocks, for a sequence may fill its last one; `low` fit, `high` do not.
        low, high = 0, num_blocks_for(limit, self.block_size) + 1
        while high - low > 1:
            middle = (low + high) // 2
            num_tokens = min(middle * self.block_size, limit)
            pools = pools_for(num_tokens)
            if pools is not None and self.capacity(pools, limit).holds(num_tokens):
                low = middle
            else:
                high = middle
        return min(low * self.block_size, limit)
