"""The cluster as this gateway knows it: its directory, its workers, and the ways to them.

The directory is polled. While it is away, what it said last still counts.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping

from baton.services.gateway.admission import Limits
from baton.services.gateway.links import DecodeLink
from baton.services.gateway.prefill_calls import PrefillCalls
from baton.services.gateway.router import (
    LocalPrefill,
    WorkerSnapshot,
    longest_sequence,
    takes_prompts,
)
from baton.services.gateway.routing import Routing
from baton.services.gateway.served_model import ServedModel
from baton.services.gateway.ways import Ways
from baton.services.gateway.workers import Workers
from baton.shared.directory.directory import (
    Directory,
    DirectoryRefused,
    DirectoryUnavailable,
    OtherModel,
    open_directory,
)
from baton.shared.directory.keys import WORKER_TTL_S
from baton.shared.directory.ledger import Stage
from baton.shared.directory.workers import ClusterView, WorkerRecord
from baton.shared.kv.capacity import Capacity
from baton.shared.model_files.info import ModelInfo
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)

_POLL_S = 0.25
_SHORT_MODEL_LEN = 2048
"""Of a model whose files leave its length to the type, until a worker tells it."""
_NOT_ASKED = DirectoryUnavailable("the directory has not been asked yet")


class Cluster:
    def __init__(
        self,
        url: str,
        name: str,
        *,
        incarnation: str,
        model: ModelInfo,
        served: ServedModel,
        local_prefill: LocalPrefill | None = None,
        media_tokens: Mapping[int, str] | None = None,
    ) -> None:
        """`media_tokens`: see `Limits`."""
        self.served = served
        self._url = url
        self._name = name
        self._incarnation = incarnation
        self._model = model
        self._media_tokens = media_tokens or {}
        self._directory: Directory | None = None
        self.directory_problem: DirectoryUnavailable | None = _NOT_ASKED
        """None while the directory answers and takes writes."""
        self.workers = Workers()
        self._limits: tuple[int, Limits] | None = None
        """Of which changes of the workers, and what they were then."""
        self._ways = Ways(incarnation, self.workers.doubt)
        self.routing = Routing(self.workers, served, self._lookup, local_prefill)

    # Following the directory

    async def connect(self) -> None:
        """Raises DirectoryMisconfigured; a directory that is away is tried again later.

        OtherModel when workers of another model are alive, which are waited for as long as it
        takes to forget them if they were killed.
        """
        give_up_at = time.monotonic() + WORKER_TTL_S + _POLL_S
        await self._try_refresh()
        while (other := self.served.other) is not None:
            if time.monotonic() > give_up_at:
                raise OtherModel(self._name, other, str(self.served))
            await asyncio.sleep(_POLL_S)
            await self._try_refresh()

    async def follow(self) -> None:
        """Until cancelled."""
        while True:
            await self._try_refresh()
            # Also when the directory says nothing new: a doubt may have run out.
            self.routing.look_again()
            await asyncio.sleep(_POLL_S)

    async def _try_refresh(self) -> None:
        try:
            view = await self._view()
        except DirectoryUnavailable as error:
            self._note_directory(error)
            return
        if self._note_directory(view.refusal):
            # It may have come back empty.
            self.workers.all_seen()
        self.served.learn(view.model)
        self.workers.seen(filter(self.served.takes, view.records))
        # Where nobody can write, workers that have said nothing may live all the same.
        unseen_s = WORKER_TTL_S if view.refusal is None else math.inf
        self.workers.keep(unseen_s=unseen_s, wanted=self.served.takes)
        await self._ways.follow(self.workers.records())

    async def _view(self) -> ClusterView:
        if self._directory is None:
            self._directory = await open_directory(self._url, self._name)
        return await self._directory.workers.view(self._incarnation)

    def _note_directory(self, problem: DirectoryUnavailable | None) -> bool:
        """Logs what is new; whether the directory is back."""
        before, self.directory_problem = self.directory_problem, problem
        if type(problem) is not type(before) or before is _NOT_ASKED:
            if problem is None:
                log_event(logger, logging.INFO, "the directory answers")
            elif isinstance(problem, DirectoryRefused):
                log_event(logger, logging.WARNING, "the directory refuses", message=problem)
            else:
                log_event(logger, logging.WARNING, "the directory is away", message=problem)
        return problem is None and before is not None

    @property
    def is_directory_reachable(self) -> bool:
        return self.directory_problem is None

    async def registered(self) -> list[WorkerRecord]:
        """Workers of whatever model, as the directory has them; none while it is away.

        Raises DirectoryMisconfigured.
        """
        try:
            return (await self._view()).records
        except DirectoryUnavailable:
            return []

    # What is known

    def snapshots(self) -> list[WorkerSnapshot]:
        return self.workers.snapshots()

    def records(self) -> list[WorkerRecord]:
        return self.workers.records()

    def worker_counters(self) -> Counter[str]:
        """Summed over the workers that are known."""
        total: Counter[str] = Counter()
        for record in self.records():
            total.update(record.load.counters)
        return total

    async def ledger_counts(self) -> dict[Stage, int]:
        """Raises DirectoryUnavailable."""
        return await self._open().ledger.count_by_stage()

    async def num_prefix_entries(self) -> int:
        """Raises DirectoryUnavailable."""
        return await self._open().prefix_index.size()

    def _open(self) -> Directory:
        if self._directory is None:
            raise DirectoryUnavailable("the directory has not been reached yet")
        return self._directory

    async def _lookup(self, hashes: list[bytes]) -> list[dict[str, str]] | None:
        """Who holds each of these; None while the directory is away."""
        if self._directory is None or not self.is_directory_reachable:
            return None
        try:
            return await self._directory.prefix_index.lookup(hashes)
        except DirectoryUnavailable:
            return None

    def limits(self) -> Limits:
        """Of what workers that go together take; the model's own while none is known.

        Only some of them may take the longest: each request goes to workers that take it
        (`choose`).
        """
        if self._limits is None or self._limits[0] != self.workers.num_changes:
            self._limits = self.workers.num_changes, self._find_limits()
        return self._limits[1]

    def _find_limits(self) -> Limits:
        workers = self.snapshots()
        own_len = self._model.max_position_embeddings or _SHORT_MODEL_LEN
        return Limits(
            vocab_size=self._model.vocab_size,
            max_model_len=_longest(workers, lambda capacity: capacity.max_model_len) or own_len,
            max_pool_tokens=_longest(workers, lambda capacity: capacity.longest),
            max_cluster_tokens=sum(w.num_tokens for w in workers if w.role != "prefill") or None,
            media_tokens=self._media_tokens,
        )

    def has_route(self) -> bool:
        return takes_prompts(self.snapshots())

    # The ways to its workers

    def link(self, worker: WorkerSnapshot) -> DecodeLink:
        return self._ways.link(worker)

    def prefill_calls(self, worker: WorkerSnapshot) -> PrefillCalls:
        return self._ways.prefill_calls(worker)

    async def close(self) -> None:
        await self._ways.close()
        if self._directory is not None:
            await self._directory.aclose()


def _longest(
    workers: Collection[WorkerSnapshot], length_of: Callable[[Capacity], int]
) -> int | None:
    """None while no worker is known. Until there are some that go together, the least of what the
    first ones take: their partners are still to come."""
    longest = longest_sequence(workers, length_of)
    if longest is not None:
        return longest
    return min((length_of(worker.capacity) for worker in workers), default=None)
