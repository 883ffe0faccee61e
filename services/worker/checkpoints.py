"""Checkpoints: copies of states, kept where a later prompt may begin.

    prompt      ──── chunk ────┤ branch ├──── chunk ────┤ last block edge ├─ rest ─►  first token
                               │                        │
    copied between two steps ──┴────────────────────────┴──► sealed when the step has retired
    answer      … one for its last block edge, in place of the one for the edge before

A state is kept in a slot that no sequence has; the least recently used checkpoint makes room. It is
found by its prefix as blocks are (prefix_cache.py), with a digest of its own, and never written
while it is. Who begins with one copies it: what was read is checked against the digest before the
first chunk that was computed from it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from baton.services.worker.part import Part
from baton.services.worker.sealing import PendingSums, Sealer
from baton.shared.engine.executor import Copied
from baton.shared.engine.kv_cache import SlotCopy
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import Sequence
from baton.shared.telemetry import Counters

Slots = Mapping[int, int]
"""By cache group of states."""


@dataclass(slots=True)
class _Restored:
    """What a sequence's state was copied from; held until that was checked."""

    sources: Slots
    sums: PendingSums


@dataclass(frozen=True, slots=True)
class _Edge:
    """The checkpoint of an answer's last block edge."""

    slots: Slots
    generations: Slots


class Checkpoints:
    def __init__(
        self,
        pools: Pools,
        sealer: Sealer,
        copy: Callable[[Seq[SlotCopy]], Copied],
        counters: Counters,
        *,
        is_on: bool,
    ) -> None:
        """`copy`: behind the steps that were launched, before those that are yet to be. Unless
        `is_on` nothing is kept."""
        self._pools = pools
        self._sealer = sealer
        self._copy = copy
        self._counters = counters
        self._is_on = is_on
        self._restored: dict[Sequence, _Restored] = {}
        self._edges: dict[Sequence, _Edge] = {}

    # Beginning with one

    def restore(self, sequence: Sequence, sources: Slots) -> None:
        """The sequence, just admitted, begins with these states; each is held for it already."""
        if not sources:
            return
        copies = []
        for group, source in sources.items():
            table, pool = sequence.block_tables[group], self._pools.of(group)
            table.left.append((source, pool.block(source).generation))
            copies.append(SlotCopy(group, source, table[0]))
        copied = self._copy(copies)
        sums = self._sealer.start_sums(self._by_group(sources), copied)
        self._restored[sequence] = _Restored(sources, sums)
        self._counters["restored_states"] += 1

    def restored(self, sequence: Sequence) -> tuple[list[list[int]], PendingSums] | None:
        """What is to be checked now that a chunk of the sequence was computed: slots by group, and
        what they held when they were copied. Nothing the next time."""
        restored = self._restored.pop(sequence, None)
        if restored is None:
            return None
        self._release(restored.sources)
        return self._by_group(restored.sources), restored.sums

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        self._edges.pop(sequence, None)
        restored = self._restored.pop(sequence, None)
        if restored is not None:
            self._release(restored.sources)

    # Keeping

    def keep(self, parts: Seq[Part]) -> PendingSums | None:
        """Copies the states of a step that was just launched, for the parts that end where one is
        to be kept. `retired` must follow for each. Returns what they will hold."""
        if not self._is_on:
            return None
        copies: list[SlotCopy] = []
        for part in parts:
            if self._is_wanted(part):
                part.kept = self._take_slots()
                copies += [
                    SlotCopy(group, part.sequence.block_tables[group][0], slot)
                    for group, slot in part.kept.items()
                ]
        if not copies:
            return None
        copied = self._copy(copies)
        wanted: list[list[int]] = [[] for _ in self._pools.groups]
        for copy in copies:
            wanted[copy.group].append(copy.target)
        return self._sealer.start_sums(wanted, copied)

    def _is_wanted(self, part: Part) -> bool:
        sequence, block_size = part.sequence, self._pools.block_size
        if part.end % block_size or not sequence.is_admitted or sequence.is_apart:
            return False
        return part.end in sequence.stops if part.is_chunk else True

    def _take_slots(self) -> dict[int, int]:
        """None where a pool of slots has none that is free."""
        pools = [self._pools.of(group) for group in self._pools.slot_groups]
        if any(pool.num_free == 0 for pool in pools):
            return {}
        return {group: self._pools.of(group).allocate(1)[0] for group in self._pools.slot_groups}

    def seal(self, part: Part, sums: PendingSums | None) -> None:
        """The part's blocks are sealed: so is the state behind it, if one was kept."""
        sequence, kept = part.sequence, part.kept
        if not kept or sequence.num_computed_tokens < part.end:
            return
        index = part.end // self._pools.block_size - 1
        is_found = [
            self._sealer.seal_state(sequence, group, slot, index, sums)
            for group, slot in kept.items()
        ]
        if not all(is_found):
            # Another one had it before.
            return
        self._counters["kept_states"] += 1
        if not part.is_chunk:
            self._forget_edge(sequence)
            generations = {group: self._generation(group, slot) for group, slot in kept.items()}
            self._edges[sequence] = _Edge(kept, generations)

    def _forget_edge(self, sequence: Sequence) -> None:
        """The edge before: unless another one uses it, its slot is the next to be taken."""
        edge = self._edges.pop(sequence, None)
        if edge is None:
            return
        for group, slot in edge.slots.items():
            block = self._pools.of(group).block(slot)
            is_same = block.generation == edge.generations[group] and block.node is not None
            if is_same and block.ref_count == 0:
                self._pools.prefix_cache.evicted(slot, block)

    def retired(self, parts: Seq[Part]) -> None:
        """The step has: what was taken for its parts is free, or found."""
        for part in parts:
            if part.kept:
                self._release(part.kept)
                part.kept = {}

    def held(self, steps: Seq[Seq[Part]]) -> Iterator[tuple[int, int]]:
        """(group, slot) of all that is held here and by parts of steps in flight."""
        for restored in self._restored.values():
            yield from restored.sources.items()
        for parts in steps:
            for part in parts:
                yield from part.kept.items()

    def _generation(self, group: int, slot: int) -> int:
        return self._pools.of(group).block(slot).generation

    def _release(self, slots: Slots) -> None:
        for group, slot in slots.items():
            self._pools.of(group).release([slot])

    def _by_group(self, slots: Slots) -> list[list[int]]:
        return [
            [slots[group]] if group in slots else [] for group in range(len(self._pools.groups))
        ]
