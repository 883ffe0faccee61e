"""Checkpoints: copies of states, kept where a later prompt may begin.

    prompt   ──── chunk ──── branch ──── chunk ──── last block edge ── rest ─►  first token
                               │                            │
    by the step itself, or copied where a chunk ends ───────┴──► sealed when the step has retired
    answer   … one for its last block edge, in place of the one for the edge before: copied, and
             sealed unless the part turns out to have ended before it, as guesses fell

A state is kept in a slot that no sequence has; the least recently used checkpoint makes room. It is
found by its prefix as blocks are (prefix_cache.py), with a digest of its own, and never written
while it is. Who begins with one copies it: what was read is checked against the digest before the
first chunk that was computed from it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from baton.services.worker.part import KeptState, Part
from baton.services.worker.sealing import PendingSums, Sealer
from baton.shared.engine.block_sums import Writes
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

    def plan(self, parts: Seq[Part]) -> None:
        """Before a step is launched: slots for the states in the middle of its chunks. `retired`
        must follow."""
        if not self._is_on:
            return
        for part in parts:
            if part.is_chunk and not part.sequence.is_apart:
                for stop in part.sequence.stops:
                    if part.start < stop < part.end:
                        self._add(part, stop)

    def keep(self, parts: Seq[Part], behind: Writes) -> PendingSums | None:
        """When the step was launched: copies the states that are to be kept where parts end.
        `behind`: the step. Returns what the slots of all its parts will hold."""
        if not self._is_on:
            return None
        copies: list[SlotCopy] = []
        for part in parts:
            if self._is_wanted_at_end(part) and (slots := self._add(part, part.end)):
                tables = part.sequence.block_tables
                copies += [SlotCopy(group, tables[group][0], to) for group, to in slots.items()]
        wanted: list[list[int]] = [[] for _ in self._pools.groups]
        for part in parts:
            for kept in part.kept:
                for group, slot in kept.slots.items():
                    wanted[group].append(slot)
        if not any(wanted):
            return None
        return self._sealer.start_sums(wanted, self._copy(copies) if copies else behind)

    def _is_wanted_at_end(self, part: Part) -> bool:
        sequence, block_size = part.sequence, self._pools.block_size
        if part.end % block_size or not sequence.is_admitted or sequence.is_apart:
            return False
        return part.end in sequence.stops if part.is_chunk else True

    def _add(self, part: Part, position: int) -> Slots:
        slots = self._take_slots()
        if slots:
            part.kept += (KeptState(position, slots),)
        return slots

    def _take_slots(self) -> dict[int, int]:
        """None where a pool of slots has none that is free."""
        pools = [self._pools.of(group) for group in self._pools.slot_groups]
        if any(pool.num_free == 0 for pool in pools):
            return {}
        return {group: self._pools.of(group).allocate(1)[0] for group in self._pools.slot_groups}

    def seal(self, part: Part, sums: PendingSums | None) -> None:
        """The part's blocks are sealed: so are the states that were kept of it."""
        for kept in part.kept:
            if part.is_chunk or kept.position == part.sequence.num_computed_tokens:
                self._seal(part, kept, sums)

    def _seal(self, part: Part, kept: KeptState, sums: PendingSums | None) -> None:
        sequence, index = part.sequence, kept.position // self._pools.block_size - 1
        is_found = [
            self._sealer.seal_state(sequence, group, slot, index, sums)
            for group, slot in kept.slots.items()
        ]
        if not all(is_found):
            # Another one had it before.
            return
        self._counters["kept_states"] += 1
        if not part.is_chunk:
            self._forget_edge(sequence)
            generations = {
                group: self._generation(group, slot) for group, slot in kept.slots.items()
            }
            self._edges[sequence] = _Edge(kept.slots, generations)

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
        if not self._is_on:
            return
        for part in parts:
            for kept in part.kept:
                self._release(kept.slots)
            part.kept = ()

    def held(self, steps: Seq[Seq[Part]]) -> Iterator[tuple[int, int]]:
        """(group, slot) of all that is held here and by parts of steps in flight."""
        for restored in self._restored.values():
            yield from restored.sources.items()
        for parts in steps:
            for part in parts:
                for kept in part.kept:
                    yield from kept.slots.items()

    def _generation(self, group: int, slot: int) -> int:
        return self._pools.of(group).block(slot).generation

    def _release(self, slots: Slots) -> None:
        for group, slot in slots.items():
            self._pools.of(group).release([slot])

    def _by_group(self, slots: Slots) -> list[list[int]]:
        return [
            [slots[group]] if group in slots else [] for group in range(len(self._pools.groups))
        ]
