"""What Pools and PrefixCache should do, said as simply as possible and as slowly as need be.

A prefix is known here by its tokens, not by its hash. All tokens of a block are equal, so that a
block is one letter, and a prefix a tuple of letters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from baton.shared.kv.block_hash import PREFIX_STRIDE_TOKENS, chain_hashes, root_hash
from baton.shared.kv.block_pool import Digest
from baton.shared.kv.cache_spec import (
    CacheGroup,
    CacheSpec,
    Full,
    Sliding,
    State,
    StateTensor,
    window_of,
)
from baton.shared.kv.capacity import Capacity, GroupShare

BLOCK_SIZE = 128
"""The directory lists every second block."""
ROOT = root_hash("a" * 64)

Path = tuple[int, ...]
"""The letters of a block and of all before it."""
BlockOf = tuple[int, int]
"""(pool, block id)."""


def tokens_of(path: Path) -> tuple[int, ...]:
    return tuple(letter for letter in path for _ in range(BLOCK_SIZE))


@lru_cache(maxsize=4096)
def hashes_of(path: Path) -> list[bytes]:
    return chain_hashes(ROOT, tokens_of(path), BLOCK_SIZE)


def make_groups(specs: Iterable[CacheSpec]) -> tuple[CacheGroup, ...]:
    return tuple(CacheGroup(spec, (layer,)) for layer, spec in enumerate(specs))


FULL, OTHER_FULL = Full(2, 8), Full(1, 16)
STATE = State(2, (StateTensor("sum", (8, 4), "float32"),))


def sliding(window: int) -> Sliding:
    return Sliding(2, 8, window)


def make_capacity(
    num_blocks: Sequence[int], pools: Sequence[int], max_blocks: Sequence[int | None] | None = None
) -> Capacity:
    shares = max_blocks or [None] * len(pools)
    groups = tuple(GroupShare(pool, most) for pool, most in zip(pools, shares, strict=True))
    return Capacity(BLOCK_SIZE, tuple(num_blocks), groups, 4096)


class Model:
    def __init__(self, groups: Sequence[CacheGroup], capacity: Capacity) -> None:
        self._windows = [
            # A hit would need the state behind the last token before it.
            window_of(group.spec) if group.spec.grows else 2
            for group in groups
        ]
        self.has_states = not all(group.spec.grows for group in groups)
        self._pools = [share.pool for share in capacity.groups]
        ids = [range(num_blocks) for num_blocks in capacity.num_blocks]
        self.num_references = Counter[BlockOf]()
        self.generations = [[0 for _ in each] for each in ids]
        self.digests: list[list[Digest | None]] = [[None for _ in each] for each in ids]
        self.sealed: dict[BlockOf, tuple[int, Path]] = {}
        """Group and prefix of sealed blocks, those included that a twin keeps from being found."""
        self.findable: dict[tuple[int, Path], int] = {}
        """By group and prefix."""
        self.blank = [set(each) for each in ids]
        """By pool: free, and nobody can find them. Taken first, in whatever order."""
        self.cached: list[list[int]] = [[] for _ in ids]
        """By pool: free and findable, least recently used first."""

    @property
    def num_free(self) -> list[int]:
        return [len(a) + len(b) for a, b in zip(self.blank, self.cached, strict=True)]

    # Finding

    def needed(self, group: int, depth: int) -> range:
        """The blocks before a token at the beginning of the block at `depth` that it reads."""
        window = self._windows[group]
        if window is None:
            return range(depth)
        position = depth * BLOCK_SIZE
        read = range(max(0, position - window + 1), position)
        return range(read.start // BLOCK_SIZE, depth) if read else range(0)

    def is_valid(self, path: Path) -> bool:
        return all(
            (group, path[: index + 1]) in self.findable
            for group in range(len(self._windows))
            for index in self.needed(group, len(path))
        )

    def match(self, path: Path) -> int:
        return max(d for d in range(len(path) + 1) if not d or self.is_valid(path[:d]))

    def listed(self) -> set[bytes]:
        """What the directory is to list."""
        valid = {path for _, path in self.findable if self.is_valid(path)}
        stride = PREFIX_STRIDE_TOKENS // BLOCK_SIZE
        if self.has_states:
            # A state is kept anywhere, and listed where the directory looks.
            valid = {path[: len(path) - len(path) % stride] for path in valid}
        return {hashes_of(path)[-1] for path in valid if path and len(path) % stride == 0}

    # Taking and giving back; blocks of one pool

    def take(self, pool: int, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            self.num_references[pool, block_id] += 1
            self.blank[pool].discard(block_id)
            if block_id in self.cached[pool]:
                self.cached[pool].remove(block_id)

    def give_back(self, pool: int, block_ids: Sequence[int]) -> None:
        for block_id in reversed(block_ids):
            self.num_references[pool, block_id] -= 1
            if not self.num_references[pool, block_id]:
                if self._is_findable(pool, block_id):
                    self.cached[pool].append(block_id)
                else:
                    self.blank[pool].add(block_id)

    def allocated(self, pool: int, block_ids: Iterable[int]) -> None:
        """Checks that these were the ones to take, and takes them."""
        for block_id in block_ids:
            if self.blank[pool]:
                assert block_id in self.blank[pool], "a findable block went before an unfindable"
            else:
                assert block_id == self.cached[pool][0], "not the least recently used block"
                self._evict(pool, block_id)
            self.take(pool, [block_id])
            self.generations[pool][block_id] += 1
            self.digests[pool][block_id] = None
            self.sealed.pop((pool, block_id), None)

    def _is_findable(self, pool: int, block_id: int) -> bool:
        of = self.sealed.get((pool, block_id))
        return of is not None and self.findable.get(of) == block_id

    # Contents

    def seal(self, group: int, block_id: int, path: Path, digest: Digest | None) -> None:
        pool = self._pools[group]
        self.digests[pool][block_id] = digest
        self.sealed[pool, block_id] = group, path
        parents_are_there = len(path) == 1 or all(
            (other, path[:-1]) in self.findable
            for other, window in enumerate(self._windows)
            if window is None
        )
        if (group, path) not in self.findable and parents_are_there:
            self.findable[group, path] = block_id

    def drop(self, pool: int, block_id: int) -> set[BlockOf]:
        """→ (group, block id) of all that is lost."""
        of = self.sealed.pop((pool, block_id), None)
        return set() if of is None else self._forget(of[1])

    def _evict(self, pool: int, block_id: int) -> None:
        group, path = self.sealed[pool, block_id]
        if self._windows[group] is None:
            self._forget(path)
        else:
            self._lose(group, path)

    def _forget(self, ancestor: Path) -> set[BlockOf]:
        """Nothing that begins with these letters can be found any more, in any group."""
        doomed = [of for of in self.findable if of[1][: len(ancestor)] == ancestor]
        return {(group, self._lose(group, path)) for group, path in doomed}

    def _lose(self, group: int, path: Path) -> int:
        pool, block_id = self._pools[group], self.findable.pop((group, path))
        self.sealed.pop((pool, block_id), None)
        if block_id in self.cached[pool]:
            self.cached[pool].remove(block_id)
            self.blank[pool].add(block_id)
        return block_id
