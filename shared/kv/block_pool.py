"""BlockPool: who holds which block, which blocks can be found by their hash, which are free.

Each block is in exactly one of these places:

    free       nobody holds it; in the free queue, least recently used first. With a hash it is
               still found by its prefix until it is taken for something else (evicted).
    held       sequences hold `ref_count` ≥ 1 references; those that share a prefix share blocks.
    quarantine held also by a transfer that may still write into it, whoever else lets go.

A block can be found only while its parent can, so that what descends from a dropped block goes
with it, also where a block between the two was evicted.

Bookkeeping only: no bytes, no torch, no I/O, one thread. `check_integrity` is cheap enough for a
test to call it after every operation.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

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
    """Of a sealed block; the pool's hash table says which of those with equal hashes is found."""
    parent_hash: bytes | None = None
    token_ids: tuple[int, ...] = ()
    digest: DigestRow | None = None
    is_listed: bool = False
    """By the directory, as long as the block can be found."""


@dataclass(slots=True)
class CacheChanges:
    """Listed hashes that became findable, and that ceased to be, in order of first mention."""

    added: dict[bytes, None] = field(default_factory=dict)
    removed: dict[bytes, None] = field(default_factory=dict)


class BlockPool:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blocks = [Block() for _ in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._by_hash: dict[bytes, int] = {}
        self._children: dict[bytes, set[bytes]] = {}
        self._quarantine: Counter[int] = Counter()
        self._changes = CacheChanges()

    @property
    def num_free(self) -> int:
        """Blocks that an allocation could have, those with a hash included."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._by_hash)

    @property
    def num_quarantined(self) -> int:
        return len(self._quarantine)

    def block(self, block_id: int) -> Block:
        """To read; only the pool changes it."""
        return self._blocks[block_id]

    def generations(self, block_ids: Sequence[int]) -> list[int]:
        return [self._blocks[block_id].generation for block_id in block_ids]

    # Finding

    def match(self, hashes: Sequence[bytes], token_ids: Sequence[int]) -> list[int]:
        """The longest run of cached blocks from the front; takes no reference.

        Token ids are compared too, so that a hash collision can't serve another prompt's blocks.
        """
        block_ids: list[int] = []
        for index, block_hash in enumerate(hashes):
            block_id = self._by_hash.get(block_hash)
            if block_id is None:
                break
            start = index * self.block_size
            if self._blocks[block_id].token_ids != tuple(
                token_ids[start : start + self.block_size]
            ):
                break
            block_ids.append(block_id)
        return block_ids

    def num_free_beside(self, matched: Sequence[int]) -> int:
        """Free blocks that are left when the matched ones, which may be free too, are taken."""
        return len(self._free) - sum(self._blocks[b].ref_count == 0 for b in matched)

    # Taking and giving back

    def acquire(self, block_ids: Sequence[int]) -> None:
        """Takes one more reference on each."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.ref_count == 0:
                del self._free[block_id]
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
            if block.block_hash is not None and self._is_findable(block_id):
                self._forget_run(block.block_hash)
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
                if not self._is_findable(block_id):
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

    def seal(
        self,
        block_id: int,
        block_hash: bytes,
        parent_hash: bytes | None,
        token_ids: tuple[int, ...],
        digest: DigestRow | None,
        *,
        is_listed: bool = False,
    ) -> None:
        """The block is full and final: it can be found from now on, if its parent can.

        `parent_hash` is None for the first block of a prompt. When another block has the same
        hash, that one stays the findable one: block tables only grow at their end, so no
        sequence is moved over.
        """
        block = self._blocks[block_id]
        block.block_hash, block.digest = block_hash, digest
        if block_hash in self._by_hash:
            return
        if parent_hash is not None:
            if parent_hash not in self._by_hash:
                return
            children = self._children.get(parent_hash)
            if children is None:
                self._children[parent_hash] = {block_hash}
            else:
                children.add(block_hash)
        block.parent_hash, block.token_ids = parent_hash, token_ids
        self._by_hash[block_hash] = block_id
        block.is_listed = is_listed
        if is_listed:
            self._changes.removed.pop(block_hash, None)
            self._changes.added[block_hash] = None

    def set_digest(self, block_id: int, digest: DigestRow) -> None:
        """For a block that is frozen without being full, or that was sealed without digest."""
        self._blocks[block_id].digest = digest

    def drop(self, block_id: int) -> None:
        """Makes a block and all that descend from it unfindable; whoever holds them keeps them.

        Also when another block with its hash is the findable one: descendants don't tell from
        which of the two they were computed.
        """
        block = self._blocks[block_id]
        if block.block_hash is not None and block.block_hash in self._by_hash:
            self._forget_run(block.block_hash)
        block.block_hash = None

    def take_changes(self) -> CacheChanges:
        """What changed since the last call, for the directory."""
        changes, self._changes = self._changes, CacheChanges()
        return changes

    def _is_findable(self, block_id: int) -> bool:
        block_hash = self._blocks[block_id].block_hash
        return block_hash is not None and self._by_hash.get(block_hash) == block_id

    def _forget_run(self, block_hash: bytes) -> None:
        """A findable hash, and all that descend from it, can't be found any more."""
        parent_hash = self._blocks[self._by_hash[block_hash]].parent_hash
        if parent_hash is not None:
            siblings = self._children[parent_hash]
            siblings.discard(block_hash)
            if not siblings:
                del self._children[parent_hash]
        doomed = [block_hash]
        while doomed:
            current = doomed.pop()
            doomed.extend(self._children.pop(current, ()))
            block_id = self._by_hash.pop(current)
            if block_id in self._free:
                self._free.move_to_end(block_id, last=False)
            block = self._blocks[block_id]
            if block.is_listed:
                self._changes.added.pop(current, None)
                self._changes.removed[current] = None
            block.is_listed = False
            block.block_hash = block.parent_hash = None
            block.token_ids = ()

    def check_integrity(self, held: Iterable[Sequence[int]] | None = None) -> None:
        """Raises AssertionError with what is wrong.

        `held`: every block table and other holder of references; when given, each block's count
        must be exactly what they and the quarantine add up to.
        """
        for block_id, block in enumerate(self._blocks):
            _check(block.ref_count >= 0, f"block {block_id}: negative reference count")
            _check(
                (block_id in self._free) == (block.ref_count == 0),
                f"block {block_id}: {block.ref_count} references, "
                f"{'in' if block_id in self._free else 'not in'} the free queue",
            )
        for block_hash, block_id in self._by_hash.items():
            block = self._blocks[block_id]
            _check(block.block_hash == block_hash, f"block {block_id}: found by a wrong hash")
            _check(len(block.token_ids) == self.block_size, f"block {block_id}: not full")
            _check(
                block.parent_hash is None
                or block.parent_hash in self._by_hash
                and block_hash in self._children.get(block.parent_hash, ()),
                f"block {block_id}: found, its parent not",
            )
        _check(
            sum(map(len, self._children.values()))
            == sum(self._blocks[b].parent_hash is not None for b in self._by_hash.values()),
            "children and hash table disagree",
        )
        for block_id, count in self._quarantine.items():
            _check(
                0 < count <= self._blocks[block_id].ref_count, f"block {block_id}: quarantine lost"
            )
        if held is not None:
            expected = Counter(self._quarantine)
            for block_ids in held:
                expected.update(block_ids)
            for block_id, block in enumerate(self._blocks):
                _check(
                    block.ref_count == expected[block_id],
                    f"block {block_id}: {block.ref_count} references, {expected[block_id]} held",
                )


def _check(holds: bool, problem: str) -> None:
    # Not `assert`: the check must also work under `python -O`.
    if not holds:
        raise AssertionError(problem)
