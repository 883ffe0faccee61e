"""Admission: a prompt takes its cached blocks, and room for all the rest, or it waits.

Who computes a prompt needs a prefix that every cache group has; who reads it from another worker
leaves out what it holds, group by group. Two prompts with a common prefix that arrive together
compute (or pull) it once: the second one waits for the first one's blocks, then finds them in the
cache. Who is to tell of the prompt how likely it was computes all of it, and waits for no prefix.

A state is nobody else's: it takes a slot each time. Where layers keep one, who computes begins with
a copy of a checkpoint, and waits for another that is about to keep one of its own prefix. Blocks
that are found behind the checkpoint are shared all the same: of their tokens states are computed
anew, and nothing is stored. Where states of a prompt are to be kept: stops.py.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from baton.services.prefill.scheduler import Admission, admission
from baton.services.worker import stops
from baton.services.worker.sealing import Corrupt, Sealer
from baton.services.worker.sequence_table import SequenceTable
from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.kv.capacity import num_blocks_for
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import BlockTable, Place, Sequence, SequenceState


@dataclass(frozen=True, slots=True)
class _Found:
    """What of a prompt is cached here."""

    depth: int
    """Blocks at the front that need not be computed, or read."""
    num_stored: int
    """The same, but that states may have to be computed."""
    blocks: list[list[int]]
    """By group, from `first` on: a block, or NO_BLOCK where a new one is needed."""
    first: list[int]
    """By group: the first block that is needed."""
    sources: dict[int, int] = field(default_factory=dict)
    """By group of states: the checkpoint to begin with."""
    branch: int = 0
    """Blocks at the front that it has in common with another prompt, which goes on differently."""


class Admitter:
    def __init__(
        self,
        pools: Pools,
        sealer: Sealer,
        table: SequenceTable,
        on_dropped: Callable[[Corrupt], None],
        *,
        keeps_states: bool = False,
    ) -> None:
        """`on_dropped`: told of blocks that failed their check. `keeps_states`: checkpoints are
        taken where sequences stop."""
        self._pools = pools
        self._sealer = sealer
        self._table = table
        self._on_dropped = on_dropped
        self._keeps_states = keeps_states
        self._slot_groups = pools.slot_groups
        self._growing = [n for n, group in enumerate(pools.groups) if group.spec.grows]
        self._depths: dict[Sequence, int] = {}
        """Of those that wait: how deep their prefix was found last."""
        self._new_places: dict[Sequence, set[Place]] = {}
        self._sources: dict[Sequence, dict[int, int]] = {}
        self._coming: dict[bytes, tuple[Sequence, int]] = {}
        """Hash of a block that a sequence computes or pulls → who, and where in its tables."""

    def try_admit(self, sequence: Sequence, *, reads: bool) -> Admission:
        """Gives the sequence its block tables when it may have them now.

        `reads`: another worker computes the prompt.
        """
        may_wait = bool(self._growing) if reads else not sequence.wants_prompt_logprobs
        is_coming = self._is_coming if reads or not self._slot_groups else self._state_is_coming
        if may_wait and is_coming(sequence, self._depths.get(sequence, 0)):
            return Admission.WAIT_FOR_PREFIX
        found = self._held(sequence) if reads else self._hit(sequence)
        if found.sources and not self._has_slots_beside(found):
            # Better to compute all of it than to wait for a slot beside its own checkpoint.
            found = self._hit(sequence, may_restore=False)
        self._depths[sequence] = found.depth
        verdict = admission(
            num_new_blocks=self._num_new_blocks(found),
            num_free_blocks=self._num_free_beside(found),
            num_growing=self._num_growing(),
            prefix_is_coming=may_wait and is_coming(sequence, found.depth),
        )
        if verdict is Admission.ADMIT:
            if sequence.distrust and self._has_corrupt(found):
                return self.try_admit(sequence, reads=reads)
            self._take(sequence, found)
        return verdict

    def take_new_places(self, sequence: Sequence) -> set[Place]:
        """Of a sequence that was just admitted: where in its tables nothing was cached."""
        return self._new_places.pop(sequence)

    def take_sources(self, sequence: Sequence) -> dict[int, int]:
        """Of a sequence that was just admitted: the checkpoints, by group, that it begins with.
        Each is held once for it."""
        return self._sources.pop(sequence, {})

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended: what it was about to fill is not coming any more."""
        self._depths.pop(sequence, None)
        self._new_places.pop(sequence, None)
        for block_hash in sequence.block_hashes:
            coming = self._coming.get(block_hash)
            if coming is not None and coming[0] is sequence:
                del self._coming[block_hash]

    # What is cached

    def _num_usable(self, sequence: Sequence) -> int:
        """A hit covers at most N − 1 tokens: the last one is computed to draw the next."""
        return (sequence.num_prompt_tokens - 1) // self._pools.block_size

    def _is_coming(self, sequence: Sequence, index: int) -> bool:
        """Whether another sequence is about to fill the block at `index` of this one's prompt."""
        if sequence.distrust or index >= self._num_usable(sequence):
            return False
        coming = self._coming.get(sequence.block_hashes[index])
        return coming is not None and coming[0].num_sealed_blocks <= coming[1]

    def _state_is_coming(self, sequence: Sequence, depth: int) -> bool:
        """Whether another sequence is about to keep a state of this one's prompt."""
        if sequence.distrust or not self._keeps_states:
            return False
        others = self._table.in_state(SequenceState.PREFILLING)
        most = self._num_usable(sequence)
        return stops.is_coming(sequence, others, depth, most, self._pools.block_size)

    def _hit(self, sequence: Sequence, *, may_restore: bool = True) -> _Found:
        """The deepest prefix that is valid in every group, and room for what is computed behind."""
        num_usable = 0 if sequence.wants_prompt_logprobs else self._num_usable(sequence)
        hashes, token_ids = sequence.block_hashes[:num_usable], sequence.prompt_token_ids
        cache, block_size, groups = (
            self._pools.prefix_cache,
            self._pools.block_size,
            self._pools.groups,
        )
        nodes = cache.walk(hashes, token_ids)
        depth = cache.depth(nodes)
        if sequence.distrust:
            nodes = nodes[: self._num_with_digests(sequence, depth)]
            depth = cache.depth(nodes)
        num_seen, is_branch = depth, False
        if self._slot_groups and nodes:
            num_seen, is_branch = len(nodes), bool(nodes[-1].children)
        if not may_restore:
            depth = 0
        first = [group.first_block(depth * block_size, block_size) for group in groups]
        cached = {
            group: [node.blocks[group] for node in nodes[first[group] : num_seen]]
            for group in self._growing
        }
        num_stored = min(
            (first[group] + _num_at_the_front(found) for group, found in cached.items()),
            default=depth,
        )
        blocks = []
        for group, start in enumerate(first):
            if group in cached:
                held = cached[group][: num_stored - start]
                end = self._end_of_room(sequence, group, start)
                blocks.append(held + [NO_BLOCK] * (end - start - len(held)))
            else:
                blocks.append([NO_BLOCK])
        sources = {
            group: self._find(sequence, group, depth - 1) for group in self._slot_groups if depth
        }
        return _Found(depth, num_stored, blocks, first, sources, num_seen if is_branch else 0)

    def _end_of_room(self, sequence: Sequence, group: int, first: int) -> int:
        """Up to which block a group has room at once: all, or as far ahead of its window as it
        goes; the rest follows when blocks were given back behind it."""
        whole = num_blocks_for(sequence.num_prompt_tokens, self._pools.block_size)
        most = self._pools.capacity.groups[group].max_blocks
        return whole if most is None else min(whole, first + most)

    def _num_with_digests(self, sequence: Sequence, depth: int) -> int:
        """Blocks at the front of which each group that has them has a digest to check."""
        for index in range(depth):
            for group in range(len(self._pools.groups)):
                block_id = self._find(sequence, group, index)
                if block_id != NO_BLOCK and not self._has_digest(group, block_id):
                    return index
        return depth

    def _held(self, sequence: Sequence) -> _Found:
        """Of all blocks that follow-up tokens read, those that are here, whichever they are."""
        block_size, usable = self._pools.block_size, self._num_usable(sequence)
        end = num_blocks_for(sequence.num_prompt_tokens, block_size)
        first, blocks, depth = [], [], usable if self._growing else 0
        for group, each in enumerate(self._pools.groups):
            start = each.first_block(sequence.num_prompt_tokens, block_size)
            if not each.spec.grows:
                first.append(start)
                blocks.append([NO_BLOCK])
                continue
            held = self._find_each(sequence, group, start, usable)
            if sequence.distrust:
                held = [self._if_checkable(group, block_id) for block_id in held]
            if NO_BLOCK in held:
                depth = min(depth, start + held.index(NO_BLOCK))
            first.append(start)
            blocks.append(held + [NO_BLOCK] * (end - start - len(held)))
        return _Found(depth, depth, blocks, first)

    def _find(self, sequence: Sequence, group: int, index: int) -> int:
        [found] = self._find_each(sequence, group, index, index + 1)
        return found

    def _find_each(self, sequence: Sequence, group: int, first: int, end: int) -> list[int]:
        """Blocks by index."""
        return self._pools.prefix_cache.find_each(
            sequence.block_hashes[first:end], group, sequence.prompt_token_ids
        )

    def _if_checkable(self, group: int, block_id: int) -> int:
        is_there = block_id != NO_BLOCK and self._has_digest(group, block_id)
        return block_id if is_there else NO_BLOCK

    def _has_digest(self, group: int, block_id: int) -> bool:
        return self._pools.of(group).block(block_id).digest is not None

    def _has_corrupt(self, found: _Found) -> bool:
        """Whether any of the cached blocks had to go."""
        has_dropped = False
        for group, block_ids in enumerate(found.blocks):
            sources = [found.sources[group]] if group in found.sources else []
            corrupt = self._sealer.drop_corrupt(group, block_ids + sources)
            if corrupt:
                self._on_dropped(corrupt)
                has_dropped = True
        return has_dropped

    # Room

    def _num_new_blocks(self, found: _Found) -> list[int]:
        """By pool."""
        wanted = [0] * len(self._pools.by_number)
        for share, blocks in zip(self._pools.capacity.groups, found.blocks, strict=True):
            wanted[share.pool] += blocks.count(NO_BLOCK)
        return wanted

    def _num_free_beside(self, found: _Found) -> list[int]:
        """By pool: free blocks that are left when the cached ones, which may be free too, are
        taken."""
        free = self._pools.num_free
        for group, blocks in enumerate(found.blocks):
            cached = [block_id for block_id in blocks if block_id != NO_BLOCK]
            cached += [found.sources[group]] if group in found.sources else []
            free[self._pools.capacity.groups[group].pool] -= self._pools.of(group).num_free_among(
                cached
            )
        return free

    def _has_slots_beside(self, found: _Found) -> bool:
        """Whether there is a slot for the sequence that is not the one it begins with, or none at
        all."""
        free, beside = self._pools.num_free, self._num_free_beside(found)
        pools = {self._pools.capacity.groups[group].pool for group in found.sources}
        return all(beside[pool] > 0 or free[pool] == 0 for pool in pools)

    def _num_growing(self) -> list[int]:
        """By pool: blocks that the sequences here will need when each has filled its last."""
        num_growing = len(self._table.growing())
        growing = [0] * len(self._pools.by_number)
        for group, share in zip(self._pools.groups, self._pools.capacity.groups, strict=True):
            if group.spec.grows:
                growing[share.pool] += num_growing
        return growing

    def _take(self, sequence: Sequence, found: _Found) -> None:
        for group, blocks in enumerate(found.blocks):
            pool = self._pools.of(group)
            pool.acquire(block_id for block_id in blocks if block_id != NO_BLOCK)
        for group, slot in found.sources.items():
            self._pools.of(group).acquire([slot])
        if found.sources:
            self._sources[sequence] = found.sources
        for group, blocks in enumerate(found.blocks):
            new = iter(self._pools.of(group).allocate(blocks.count(NO_BLOCK)))
            table = BlockTable(
                [next(new) if block_id == NO_BLOCK else block_id for block_id in blocks],
                first_live=found.first[group],
            )
            table.num_sealed = max(found.num_stored, table.first_live)
            sequence.block_tables.append(table)
        self._new_places[sequence] = {
            (group, index)
            for group, blocks in enumerate(found.blocks)
            for index, block_id in enumerate(blocks, found.first[group])
            if block_id == NO_BLOCK
        }
        block_size = self._pools.block_size
        sequence.is_admitted = True
        sequence.num_room_tokens = self._pools.num_room_tokens(
            sequence.block_tables, sequence.num_prompt_tokens
        )
        sequence.num_cached_tokens = found.depth * block_size
        sequence.num_stored_tokens = found.num_stored * block_size
        if self._keeps_states:
            sequence.stops = stops.of_prompt(
                self._num_usable(sequence), found.branch, found.depth, block_size
            )
        for index, block_hash in enumerate(
            sequence.block_hashes[found.num_stored :], found.num_stored
        ):
            self._coming[block_hash] = (sequence, index)


def _num_at_the_front(block_ids: Seq[int]) -> int:
    """How many there are before the first that is missing."""
    return block_ids.index(NO_BLOCK) if NO_BLOCK in block_ids else len(block_ids)
