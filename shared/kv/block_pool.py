"""BlockPool: who holds which block, and which are free.

Each block is in exactly one of these places:

    free       nobody holds it; in the free queue, least recently used first. What it caches is
               found by its prefix (prefix_cache.py) until it is taken for something else.
    held       sequences hold `ref_count` ≥ 1 references; those that share a prefix share blocks.
    quarantine held also by a transfer that may still write into it, whoever else lets go.

Bookkeeping only: no bytes, no torch, no I/O, one thread. `check_integrity` is cheap enough for a
test to call it after every operation.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from baton.shared.kv.prefix_cache import Node

NO_BLOCK = -1
"""In a block table: there is none, nor need be. Reads as zeros."""

Digest = tuple[int, ...]
"""One 64-bit value per KV head; see digest.py."""
DigestRow = Digest | memoryview
"""The same, or a row of an array of uint64, which compares and iterates alike. The two kinds are
never equal to each other: one pool has one of them."""


class PoolExhausted(Exception):
    """No free block is left for what was asked."""


@dataclass(slots=True)
class Block:
    """One block; `generation` counts how often its id was given out."""

    ref_count: int = 0
    generation: int = 0
    block_hash: bytes | None = None
    """Of a sealed block: the chained hash of the tokens up to its end."""
    node: Node | None = None
    """Where the prefix cache finds it; of blocks with one hash and group it finds one."""
    group: int = 0
    """The cache group that it was sealed for."""
    digest: DigestRow | None = None


class BlockPool:
    def __init__(
        self, num_blocks: int, *, on_evicted: Callable[[int, Block], None] | None = None
    ) -> None:
        """`on_evicted`: told of a block that can be found, just before it is taken."""
        self.num_blocks = num_blocks
        self._blocks = [Block() for _ in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._quarantine: Counter[int] = Counter()
        self._on_evicted = on_evicted

    @property
    def num_free(self) -> int:
        """Blocks that an allocation could have, those that cache something included."""
        return len(self._free)

    @property
    def num_quarantined(self) -> int:
        return len(self._quarantine)

    def block(self, block_id: int) -> Block:
        """To read; only the pool and the prefix cache change it."""
        return self._blocks[block_id]

    def generations(self, block_ids: Sequence[int]) -> list[int]:
        return [self._blocks[block_id].generation for block_id in block_ids]

    def digests(self, block_ids: Iterable[int]) -> dict[int, DigestRow]:
        """By block, in the order of these; without those that have none, and without NO_BLOCK."""
        blocks = self._blocks
        return {
            block_id: digest
            for block_id in block_ids
            if block_id != NO_BLOCK and (digest := blocks[block_id].digest) is not None
        }

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """How many of these nobody holds."""
        blocks = self._blocks
        return sum([blocks[block_id].ref_count == 0 for block_id in block_ids])

    # Taking and giving back

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Takes one more reference on each."""
        blocks, free = self._blocks, self._free
        for block_id in block_ids:
            block = blocks[block_id]
            if block.ref_count == 0:
                del free[block_id]
            block.ref_count += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes free blocks, least recently used first, evicting what they cached.

        Raises PoolExhausted, and takes none, when too few are free.
        """
        if num_blocks > len(self._free):
            raise PoolExhausted(f"{num_blocks} blocks asked, {len(self._free)} free")
        block_ids: list[int] = []
        for _ in range(num_blocks):
            block_id = self._free.popitem(last=False)[0]
            block = self._blocks[block_id]
            if block.node is not None and self._on_evicted is not None:
                self._on_evicted(block_id, block)
            block.ref_count = 1
            block.generation += 1
            block.block_hash = block.digest = None
            block_ids.append(block_id)
        return block_ids

    def release(self, block_ids: Sequence[int]) -> None:
        """Gives one reference on each back.

        The end of a sequence becomes evictable before its beginning, which more prompts share;
        blocks that nobody can find go first.
        """
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            if block.ref_count <= 0:
                raise ValueError(f"block {block_id} is not held")
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free[block_id] = None
                if block.node is None:
                    self._free.move_to_end(block_id, last=False)

    def quarantine(self, block_ids: Sequence[int]) -> None:
        """A transfer begins to write into these: they stay taken until it has ended."""
        self.acquire(block_ids)
        self._quarantine.update(block_ids)

    def lift_quarantine(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            self._quarantine[block_id] -= 1
            if self._quarantine[block_id] == 0:
                del self._quarantine[block_id]
        self.release(block_ids)

    # Contents

    def set_digest(self, block_id: int, digest: DigestRow) -> None:
        """For a block that is frozen without being full, or that was sealed without digest."""
        self._blocks[block_id].digest = digest

    def lost(self, block_id: int) -> None:
        """The prefix cache finds the block no more: if it is free, it goes first."""
        if block_id in self._free:
            self._free.move_to_end(block_id, last=False)

    def check_integrity(self, held: Iterable[Iterable[int]] | None = None) -> None:
        """Raises AssertionError with what is wrong.

        `held`: every block table and other holder of references; when given, each block's count
        must be exactly what they and the quarantine add up to.
        """
        for block_id, block in enumerate(self._blocks):
            check(block.ref_count >= 0, f"block {block_id}: negative reference count")
            check(
                (block_id in self._free) == (block.ref_count == 0),
                f"block {block_id}: {block.ref_count} references, "
                f"{'in' if block_id in self._free else 'not in'} the free queue",
            )
        for block_id, count in self._quarantine.items():
            check(
                0 < count <= self._blocks[block_id].ref_count, f"block {block_id}: quarantine lost"
            )
        if held is not None:
            expected = Counter(self._quarantine)
            for block_ids in held:
                expected.update(block_id for block_id in block_ids if block_id != NO_BLOCK)
            for block_id, block in enumerate(self._blocks):
                check(
                    block.ref_count == expected[block_id],
                    f"block {block_id}: {block.ref_count} references, {expected[block_id]} held",
                )


def check(holds: bool, problem: str) -> None:
    # Not `assert`: the check must also work under `python -O`.
    if not holds:
        raise AssertionError(problem)
