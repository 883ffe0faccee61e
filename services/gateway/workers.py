"""Workers as this gateway knows them: what they said last, what it sent them since, and doubts.

A worker that failed an attempt is doubted for a while, by incarnation: one that was started anew is
not.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from baton.services.gateway.router import Route, WorkerSnapshot
from baton.shared.directory.workers import WorkerRecord

_DOUBT_S = 1.0
_MAX_DOUBT_S = 8.0


@dataclass(slots=True)
class _Known:
    record: WorkerRecord
    seen_at: float
    num_started: int = 0
    """Sequences sent there since the record last changed."""
    num_free_blocks: tuple[int, ...] = field(init=False)
    """By pool: what the worker said, less what was sent there since."""

    def __post_init__(self) -> None:
        self.num_free_blocks = self.record.load.num_free_blocks

    def started(self, num_tokens: int) -> None:
        """A sequence of so many prompt tokens was sent there."""
        self.num_started += 1
        taken = self.record.capacity.blocks_for(num_tokens)
        self.num_free_blocks = tuple(
            max(0, have - take) for have, take in zip(self.num_free_blocks, taken, strict=True)
        )


@dataclass(slots=True)
class _Doubt:
    until: float
    seconds: float


class Workers:
    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._doubts: dict[str, _Doubt] = {}
        self.num_changes = 0
        """How often one came, left, or was not the same any more but for its load."""
        self.outstanding_tokens: Counter[str] = Counter()
        """By incarnation: prompt tokens to compute of routes that have not ended or answered."""

    def seen(self, records: Iterable[WorkerRecord]) -> None:
        """What the directory has now."""
        now = time.monotonic()
        for record in records:
            previous = self._known.get(record.worker_id)
            if previous is not None and previous.record == record:
                previous.seen_at = now
            else:
                self._known[record.worker_id] = _Known(record, now)
                was_known = previous is not None and _is_same(previous.record, record)
                self.num_changes += not was_known

    def all_seen(self) -> None:
        """All get the time to register again, as if they had been seen now."""
        now = time.monotonic()
        for known in self._known.values():
            known.seen_at = now

    def keep(self, *, unseen_s: float, wanted: Callable[[WorkerRecord], bool]) -> None:
        """Forgets workers that are not wanted or were not seen for so long, and old doubts about
        workers that are gone."""
        now, num_before = time.monotonic(), len(self._known)
        self._known = {
            worker_id: known
            for worker_id, known in self._known.items()
            if now - known.seen_at <= unseen_s and wanted(known.record)
        }
        self.num_changes += len(self._known) < num_before
        incarnations = {known.record.incarnation for known in self._known.values()}
        self._doubts = {
            incarnation: doubt
            for incarnation, doubt in self._doubts.items()
            if incarnation in incarnations or doubt.until >= now
        }

    def records(self) -> list[WorkerRecord]:
        # A copy: a scrape of the metrics looks from another thread.
        return [known.record for known in list(self._known.values())]

    def snapshots(self) -> list[WorkerSnapshot]:
        return [
            WorkerSnapshot(
                worker_id=known.record.worker_id,
                incarnation=known.record.incarnation,
                address=known.record.address,
                role=known.record.role,
                capability_hash=known.record.capability.hash(),
                model_digest=known.record.capability.model_digest,
                capacity=known.record.capacity,
                num_free_blocks=known.num_free_blocks,
                num_waiting=known.record.load.num_waiting + known.num_started,
                num_running=known.record.load.num_running,
                prompt_tokens_per_s=known.record.load.prompt_tokens_per_s,
                path_bytes_per_s=known.record.load.path_bytes_per_s,
                num_outstanding_tokens=self.outstanding_tokens[known.record.incarnation],
                suspect=self._is_doubted(known.record.incarnation),
            )
            for known in list(self._known.values())
        ]

    # What was sent

    def started(self, route: Route, num_prompt_tokens: int) -> None:
        self.outstanding_tokens[route.computes_prompt.incarnation] += route.num_new_tokens
        for worker in (route.prefill, route.decode):
            known = self._known.get(worker.worker_id) if worker is not None else None
            if known is not None:
                known.started(num_prompt_tokens)

    def prompt_ended(self, route: Route) -> None:
        incarnation = route.computes_prompt.incarnation
        self.outstanding_tokens[incarnation] -= route.num_new_tokens
        if not self.outstanding_tokens[incarnation]:
            del self.outstanding_tokens[incarnation]

    # Doubts

    def doubt(self, incarnation: str) -> None:
        """The worker failed an attempt: nothing new goes there for a while.

        For longer each time it happens again soon after; streams that fail together count once.
        """
        now, last = time.monotonic(), self._doubts.get(incarnation)
        seconds = _DOUBT_S
        if last is not None and now < last.until + _MAX_DOUBT_S:
            if now < last.until:
                return
            seconds = min(2 * last.seconds, _MAX_DOUBT_S)
        self._doubts[incarnation] = _Doubt(now + seconds, seconds)

    def _is_doubted(self, incarnation: str) -> bool:
        doubt = self._doubts.get(incarnation)
        return doubt is not None and time.monotonic() < doubt.until


def _is_same(one: WorkerRecord, other: WorkerRecord) -> bool:
    """But for the load."""
    return one.incarnation == other.incarnation and replace(one, load=other.load) == other
