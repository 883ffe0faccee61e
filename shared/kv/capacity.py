"""How long sequences may be, and how many blocks they need, by pool: one arithmetic for gateway
and worker.

What the gateway lets through the worker never refuses, for both ask the same `Capacity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks of `block_size` tokens for so many tokens; the last one may be filled in part."""
    return -(-num_tokens // block_size)


@dataclass(frozen=True, slots=True)
class GroupShare:
    """What one cache group takes of the pools."""

    pool: int
    max_blocks: int | None = None
    """The most blocks that one sequence holds at once: its window, and what is computed ahead of
    it; a slot where its layers keep a state. None: a block for every `block_size` tokens."""

    def blocks_for(self, num_tokens: int, block_size: int) -> int:
        """The most blocks that a sequence of so many tokens holds at once."""
        whole = num_blocks_for(num_tokens, block_size)
        return whole if self.max_blocks is None else min(whole, self.max_blocks)


def blocks_by_pool(
    groups: Sequence[GroupShare], num_pools: int, num_tokens: int, block_size: int
) -> list[int]:
    """By pool: the most blocks that a sequence of so many tokens holds at once, in all groups."""
    blocks = [0] * num_pools
    for group in groups:
        blocks[group.pool] += group.blocks_for(num_tokens, block_size)
    return blocks


@dataclass(frozen=True, slots=True)
class Capacity:
    """A worker's block pools, and how long a sequence it takes at all."""

    block_size: int
    """Tokens."""
    num_blocks: tuple[int, ...]
    """By pool."""
    groups: tuple[GroupShare, ...]
    max_model_len: int
    """Tokens of the longest sequence, prompt and answer together, whatever the pools hold."""
    block_bytes: tuple[int, ...] = ()
    """By pool; none where nobody asks."""

    def blocks_for(self, num_tokens: int) -> list[int]:
        """By pool: the most blocks that a sequence of so many tokens holds at once."""
        return blocks_by_pool(self.groups, len(self.num_blocks), num_tokens, self.block_size)

    def bytes_to_move(self, num_tokens: int, num_held: int = 0) -> int:
        """What a hand-off moves of a prompt of so many tokens: states, and blocks but for those of
        its first `num_held` tokens."""
        num_bytes = 0
        for group in self.groups:
            whole = num_blocks_for(num_tokens, self.block_size)
            new = whole - num_held // self.block_size
            # Of a state, or a window, as much as there is, whatever of it is held.
            num_blocks = new if group.max_blocks is None else min(whole, group.max_blocks)
            num_bytes += num_blocks * self.block_bytes[group.pool] if self.block_bytes else 0
        return num_bytes

    def holds(self, num_tokens: int, num_free: Sequence[int] | None = None) -> bool:
        """Whether a sequence of so many tokens is not too long, and fits into the pools, or what
        is free of them."""
        room = self.num_blocks if num_free is None else num_free
        fits = all(
            need <= have for need, have in zip(self.blocks_for(num_tokens), room, strict=True)
        )
        return fits and num_tokens <= self.max_model_len

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that `holds` is true of."""
        return self.max_tokens(self.max_model_len)

    def max_tokens(self, limit: int, num_free: Sequence[int] | None = None) -> int:
        """Tokens for which the pools, or what is free of them, have room; at most `limit`."""
        room = self.num_blocks if num_free is None else num_free
        whole = min(self._max_whole(pool, blocks) for pool, blocks in enumerate(room))
        return int(min(limit, whole * self.block_size))

    def _max_whole(self, pool: int, num_free: int) -> float:
        """The most blocks' worth of tokens for which so many free blocks of a pool do."""
        shares = [group.max_blocks for group in self.groups if group.pool == pool]
        limits = sorted(most for most in shares if most is not None)
        num_groups, left = len(shares), num_free
        for most in limits:
            if left < most * num_groups:
                break
            # This group takes no more, however long the sequence is.
            left, num_groups = left - most, num_groups - 1
        return left // num_groups if num_groups else float("inf")

    def describe(self, num_tokens: int) -> str:
        """For the refusal of so many tokens: what there is."""
        if num_tokens > self.max_model_len:
            return f"{self.max_model_len} tokens in a sequence"
        if len(self.num_blocks) == 1:
            return f"{self.num_blocks[0]} blocks in the pool"
        return ", ".join(
            f"{have} blocks in pool {pool}" for pool, have in enumerate(self.num_blocks)
        )

    def describe_need(self, num_tokens: int) -> str:
        """For a refusal: what is needed, and where."""
        if num_tokens > self.max_model_len:
            return f"{num_tokens} tokens"
        needs = list(zip(self.blocks_for(num_tokens), self.num_blocks, strict=True))
        if len(needs) == 1:
            return f"{needs[0][0]} blocks"
        short = [(pool, need) for pool, (need, have) in enumerate(needs) if need > have]
        return ", ".join(f"{need} blocks of pool {pool}" for pool, need in short)
