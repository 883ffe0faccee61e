"""Keeps the directory informed, behind the engine's back: nothing here is waited for.

Heartbeat, prefix changes and ledger writes go out together in batches. While the directory is
away they pile up no further than the current truth; when it is back, all of it is said again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from itertools import islice

from baton.shared.directory.cluster_model import shown_model
from baton.shared.directory.directory import (
    Directory,
    DirectoryUnavailable,
    OtherModel,
    open_directory,
)
from baton.shared.directory.keys import LEDGER_TTL_S, WORKER_TTL_S
from baton.shared.directory.ledger import LedgerEntry
from baton.shared.directory.workers import WorkerRecord
from baton.shared.kv.prefix_cache import CacheChanges
from baton.shared.kv.sequence import AttemptKey
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
_FLUSH_S = 0.02
_PREFIX_REFRESH_S = 20.0
_LEDGER_REFRESH_S = 10.0
_WRITES = 256
"""Entries, and ends, in one round trip."""
_PATIENCE_S = WORKER_TTL_S + HEARTBEAT_S
"""Workers that were killed are taken for alive that long."""
_SETTLED_S = 2
"""A server that is younger may have lost all it knew: workers that live say it again first."""


class DirectorySync:
    def __init__(
        self,
        url: str,
        cluster: str,
        *,
        worker_id: str,
        incarnation: str,
    ) -> None:
        self._url = url
        self._cluster = cluster
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._is_retired = False
        self._has_joined = False
        self._refused_since: float | None = None
        self._registering = asyncio.Lock()
        """A heartbeat under way must not put a worker back that retires meanwhile."""
        self._directory: Directory | None = None
        self._entries: dict[tuple[str, int], LedgerEntry] = {}
        """Live entries that this worker wrote last."""
        self._dirty: dict[tuple[str, int], None] = {}
        self._finished: dict[AttemptKey, float] = {}
        """Ends to be written → when they were; the entry itself goes after LEDGER_TTL_S."""
        self._held: dict[bytes, None] = {}
        self._added: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}
        self._changed = asyncio.Event()
        self._is_away = False
        self.has_tried = asyncio.Event()
        """Set once the worker is registered, or could not reach the directory."""
        self._next_heartbeat = self._next_prefixes = self._next_ledger = 0.0

    # What the engine says; never blocks

    def write(self, entry: LedgerEntry) -> None:
        sequence = (entry.request_id, entry.sample)
        self._entries[sequence] = entry
        self._dirty[sequence] = None
        self._changed.set()

    def end(self, key: AttemptKey) -> None:
        entry = self._entries.get(key.sequence)
        if entry is not None and entry.attempt <= key.attempt:
            del self._entries[key.sequence]
            self._dirty.pop(key.sequence, None)
        self._finished[key] = time.monotonic()
        self._changed.set()

    def forget(self, key: AttemptKey) -> None:
        """The entry goes on, written by another worker: refreshing ours would revive it."""
        entry = self._entries.get(key.sequence)
        if entry is not None and entry.attempt == key.attempt:
            del self._entries[key.sequence]
            self._dirty.pop(key.sequence, None)

    def cache_changed(self, changes: CacheChanges) -> None:
        for block_hash in changes.added:
            self._held[block_hash] = None
            self._added[block_hash] = None
            self._removed.pop(block_hash, None)
        for block_hash in changes.removed:
            self._held.pop(block_hash, None)
            self._added.pop(block_hash, None)
            self._removed[block_hash] = None
        self._changed.set()

    # The task

    async def run(self, make_record: Callable[[], Awaitable[WorkerRecord]]) -> None:
        """Until cancelled; `make_record` tells the worker as it is now.

        DirectoryMisconfigured gets out; OtherModel too, at once when the worker was registered
        before, and else when the other model's workers are still there after a while.
        """
        while True:
            try:
                await self._sync(make_record)
                if self._is_away:
                    log_event(logger, logging.INFO, "the directory is back")
                self._is_away = False
            except DirectoryUnavailable as error:
                if not self._is_away:
                    log_event(logger, logging.WARNING, "the directory is away", message=error)
                self._is_away = True
                self.has_tried.set()
                self._say_all_again()
                await asyncio.sleep(HEARTBEAT_S)
                continue
            try:
                async with asyncio.timeout(max(0.0, self._next_heartbeat - time.monotonic())):
                    await self._changed.wait()
                    await asyncio.sleep(_FLUSH_S)
            except TimeoutError:
                pass
            self._changed.clear()

    async def retire(self) -> None:
        """Takes the worker off the directory: nothing new is sent here. The ledger goes on."""
        self._is_retired = True
        try:
            async with self._registering:
                if self._directory is not None:
                    await self._directory.workers.remove(self._worker_id, self._incarnation)
        except DirectoryUnavailable as error:
            log_event(logger, logging.WARNING, "could not leave the directory", message=error)

    async def close(self) -> None:
        if self._directory is not None:
            await self._directory.aclose()

    @property
    def is_reachable(self) -> bool:
        return self._directory is not None and not self._is_away

    async def connect(self) -> None:
        """Opens the directory when it can be reached; run() tries again otherwise.

        Raises DirectoryMisconfigured.
        """
        try:
            self._directory = await open_directory(self._url, self._cluster)
        except DirectoryUnavailable as error:
            log_event(logger, logging.WARNING, "the directory is away", message=error)
            self._is_away = True

    async def _sync(self, make_record: Callable[[], Awaitable[WorkerRecord]]) -> None:
        if self._directory is None:
            self._directory = await open_directory(self._url, self._cluster)
        now = time.monotonic()
        if now >= self._next_heartbeat:
            async with self._registering:
                if not self._is_retired:
                    await self._beat(self._directory, make_record)
            self._next_heartbeat = now + HEARTBEAT_S
        if now >= self._next_prefixes:
            self._added = dict(self._held)
            self._next_prefixes = now + _PREFIX_REFRESH_S
        if now >= self._next_ledger:
            self._dirty = dict.fromkeys(self._entries)
            self._next_ledger = now + _LEDGER_REFRESH_S
        await self._flush_ledger(self._directory)
        await self._flush_prefixes(self._directory)

    async def _beat(
        self, directory: Directory, make_record: Callable[[], Awaitable[WorkerRecord]]
    ) -> None:
        if not self._has_joined and await _has_just_started(directory):
            return
        try:
            await directory.workers.publish(await make_record())
        except OtherModel as error:
            now = time.monotonic()
            if self._refused_since is None:
                self._refused_since = now
                log_event(logger, logging.WARNING, "waiting for other workers", message=error)
            if self._has_joined or now - self._refused_since > _PATIENCE_S:
                raise
            return
        self._has_joined = True
        self._refused_since = None
        self.has_tried.set()

    async def _flush_ledger(self, directory: Directory) -> None:
        while self._dirty or self._finished:
            entries = [self._entries[sequence] for sequence in islice(self._dirty, _WRITES)]
            finished = list(islice(self._finished, _WRITES))
            await directory.ledger.write(entries, finished)
            for entry in entries:
                sequence = (entry.request_id, entry.sample)
                if self._entries.get(sequence) is entry:
                    self._dirty.pop(sequence, None)
            for key in finished:
                self._finished.pop(key, None)

    async def _flush_prefixes(self, directory: Directory) -> None:
        if not self._added and not self._removed:
            return
        added, removed = list(self._added), list(self._removed)
        await directory.prefix_index.publish(
            self._worker_id, self._incarnation, added=added, removed=removed
        )
        for block_hash in added:
            self._added.pop(block_hash, None)
        for block_hash in removed:
            self._removed.pop(block_hash, None)

    def _say_all_again(self) -> None:
        forgotten_before = time.monotonic() - LEDGER_TTL_S
        self._finished = {k: t for k, t in self._finished.items() if t > forgotten_before}
        self._next_heartbeat = self._next_prefixes = self._next_ledger = 0.0


async def _has_just_started(directory: Directory) -> bool:
    return await directory.workers.model() is None and await directory.age_s() < _SETTLED_S


async def check_model(url: str, cluster: str, *, name: str, digest: str) -> None:
    """Before much is loaded: whether there is a place for a worker of this model in the cluster.

    Raises OtherModel, as late as `DirectorySync.run` does, and DirectoryMisconfigured.
    """
    give_up_at = time.monotonic() + _PATIENCE_S
    try:
        directory = await open_directory(url, cluster)
        try:
            while (served := await directory.workers.model()) and served.digest != digest:
                if time.monotonic() > give_up_at:
                    raise OtherModel(cluster, served, shown_model(name, digest))
                await asyncio.sleep(HEARTBEAT_S)
        finally:
            await directory.aclose()
    except DirectoryUnavailable:
        # It is tried again when there is something to say.
        return
