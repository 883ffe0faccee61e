"""The cluster as this gateway knows it: workers, doubts about them, and the way to each.

The directory is polled; what it said last holds on while it is away. A worker that failed an
attempt is doubted for a while, by incarnation: a restarted one starts clean.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field

import grpc

from baton.services.gateway.admission import Limits
from baton.services.gateway.links import DecodeLink
from baton.services.gateway.router import LocalPrefill, Route, WorkerSnapshot, choose, longest_run
from baton.services.gateway.served_model import ServedModel
from baton.services.gateway.turns import Turn, Turns
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
from baton.shared.kv.block_hash import boundary_hashes, root_hash
from baton.shared.model_files.info import ModelInfo
from baton.shared.rpc.errors import InvalidField
from baton.shared.rpc.serve import internal_channel
from baton.shared.telemetry import log_event
from baton.v1 import decode_service_pb2

logger = logging.getLogger(__name__)

_POLL_S = 0.25
_DOUBT_S = 1.0
_MAX_DOUBT_S = 8.0
_CHANNEL_GRACE_S = 600.0
_SHORT_MODEL_LEN = 2048
"""Of a model whose files leave its length to the type, until a worker tells it."""
_NOT_ASKED = DirectoryUnavailable("the directory has not been asked yet")


@dataclass(slots=True)
class _Known:
    record: WorkerRecord
    seen_at: float
    num_started: int = 0
    """Sequences sent there since its record last changed."""
    num_tokens_started: list[int] = field(default_factory=list)
    """Of each of these."""

    def num_free_blocks(self) -> tuple[int, ...]:
        """By pool: what the worker said, less what was sent there since."""
        free = self.record.load.num_free_blocks
        for num_tokens in self.num_tokens_started:
            taken = self.record.capacity.blocks_for(num_tokens)
            free = tuple(max(0, have - take) for have, take in zip(free, taken, strict=True))
        return free


@dataclass(slots=True)
class _Doubt:
    until: float
    seconds: float


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
    ) -> None:
        self.served = served
        self._url = url
        self._name = name
        self._incarnation = incarnation
        self._model = model
        self._local_prefill = local_prefill
        late_after_s = local_prefill.late_after_s if local_prefill is not None else None
        self._may_hold = late_after_s is not None
        self._turns = Turns(late_after_s or 0.0)
        self._directory: Directory | None = None
        self.directory_problem: DirectoryUnavailable | None = _NOT_ASKED
        """None while the directory answers and takes writes."""
        self.num_waiting = 0
        """Attempts for which there is no worker, or no room at one, now."""
        self._known: dict[str, _Known] = {}
        self._doubts: dict[str, _Doubt] = {}
        self._links: dict[str, DecodeLink] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._spread = 0
        self._outstanding_tokens: Counter[str] = Counter()
        """By incarnation: prompt tokens to compute of routes that have not ended or answered."""

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
            # Also without news: a doubt may have run out.
            self._changed.set()
            self._changed = asyncio.Event()
            self._turns.wake()
            await asyncio.sleep(_POLL_S)

    async def _try_refresh(self) -> None:
        try:
            view = await self._view()
        except DirectoryUnavailable as error:
            self._note_directory(error)
            return
        now = time.monotonic()
        if self._note_directory(view.refusal):
            # It may have come back empty: live workers get the time to register again.
            for known in self._known.values():
                known.seen_at = now
        self.served.learn(view.model)
        for record in filter(self.served.takes, view.records):
            previous = self._known.get(record.worker_id)
            if previous is not None and previous.record == record:
                previous.seen_at = now
            else:
                self._known[record.worker_id] = _Known(record, now)
        for worker_id, known in list(self._known.items()):
            # Where nobody can write, those who say nothing may live all the same.
            is_gone = view.refusal is None and now - known.seen_at > WORKER_TTL_S
            if is_gone or not self.served.takes(known.record):
                del self._known[worker_id]
        await self._prune_ways()

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

    async def _prune_ways(self) -> None:
        """Closes what leads to workers that are gone and serves no sequence any more."""
        incarnations = {known.record.incarnation for known in self._known.values()}
        addresses = {known.record.address for known in self._known.values()}
        for incarnation, link in list(self._links.items()):
            if incarnation not in incarnations and not link.num_sequences:
                del self._links[incarnation]
                await link.close()
        for address, channel in list(self._channels.items()):
            if address not in addresses:
                del self._channels[address]
                # Calls that still run on it end by themselves.
                closing = asyncio.create_task(channel.close(grace=_CHANNEL_GRACE_S))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
        now = time.monotonic()
        for incarnation, doubt in list(self._doubts.items()):
            if incarnation not in incarnations and doubt.until < now:
                del self._doubts[incarnation]

    # What is known

    def doubt(self, incarnation: str) -> None:
        """The worker failed an attempt: nothing new goes there for a while.

        Longer each time it happens anew soon after; the streams that fail together count once.
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
                num_free_blocks=known.num_free_blocks(),
                num_waiting=known.record.load.num_waiting + known.num_started,
                num_running=known.record.load.num_running,
                num_outstanding_tokens=self._outstanding_tokens[known.record.incarnation],
                suspect=self._is_doubted(known.record.incarnation),
            )
            # A copy: a scrape of the metrics looks from another thread.
            for known in list(self._known.values())
        ]

    def records(self) -> list[WorkerRecord]:
        return [known.record for known in list(self._known.values())]

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

    def limits(self) -> Limits:
        """As the workers have them; the model's own while none is known."""
        records = self.records()
        lengths = [record.model.max_model_len for record in records]
        own_len = self._model.max_position_embeddings or _SHORT_MODEL_LEN
        max_model_len = min(lengths, default=own_len)
        pools = [
            max(
                (r.capacity.max_tokens(max_model_len) for r in records if r.role != other_side),
                default=None,
            )
            for other_side in ("prefill", "decode")
        ]
        return Limits(
            vocab_size=self._model.vocab_size,
            max_model_len=max_model_len,
            max_pool_tokens=min((pool for pool in pools if pool is not None), default=None),
        )

    def has_route(self) -> bool:
        return choose(self.snapshots(), {}, 1, 1) is not None

    # The way to a worker

    async def route(
        self,
        token_ids: list[int],
        num_new_tokens: int,
        capability_hash: str | None,
        *,
        salt: bytes = b"",
        has_begun: bool = False,
        begun_on: str | None = None,
    ) -> Route:
        """Locates the prompt's prefixes and chooses; waits as long as nobody can take it.

        `salt` is that of the prompt's block hashes: only prefixes with the same one are found.

        An answer that has begun, of which its reader has tokens, is never held; `begun_on` is the
        digest of the model that these came from.

        Whoever takes the route calls `prompt_ended` for it, once.

        Raises InvalidField when no pool will ever hold it, and ModelReplaced when the cluster
        serves another model.
        """
        with self._turns.turn() as turn:
            while True:
                route = await self._try_route(
                    token_ids,
                    num_new_tokens,
                    capability_hash,
                    salt,
                    turn,
                    may_hold=self._may_hold and not has_begun,
                    begun_on=begun_on,
                )
                if route is not None:
                    return route

    async def _try_route(
        self,
        token_ids: list[int],
        num_new_tokens: int,
        capability_hash: str | None,
        salt: bytes,
        turn: Turn,
        *,
        may_hold: bool,
        begun_on: str | None,
    ) -> Route | None:
        """None after a wait: something may be different now."""
        changed = self._changed
        self.served.check(begun_on)
        snapshots = self.snapshots()
        if choose(snapshots, {}, 1, 1, capability_hash=capability_hash) is None:
            # Who is held has nobody behind who could go: one by one they go on, not all at once.
            await self._wait(turn.hold() if may_hold else changed.wait())
            return None
        hits = await self._locate(token_ids, salt, snapshots)
        num_tokens = len(token_ids) + num_new_tokens
        # Others may have been sent meanwhile; until the route is noted nothing else runs.
        snapshots = self.snapshots()

        def best(local_prefill: LocalPrefill | None) -> Route | None:
            return choose(
                snapshots,
                hits,
                len(token_ids),
                num_tokens,
                capability_hash=capability_hash,
                local_prefill=local_prefill,
                spread=self._spread,
            )

        route = best(self._local_prefill)
        if not may_hold:
            route = route or best(None)
        elif not turn.has_come if route is not None else best(None) is not None:
            await self._wait(turn.hold())
            return None
        if route is not None:
            self._spread += 1
            self._note_started(route, len(token_ids))
            return route
        if snapshots and not any(s.capacity.holds(num_tokens) for s in snapshots):
            largest = max((s.capacity for s in snapshots), key=lambda c: c.max_tokens(num_tokens))
            limit = f"{largest.describe()}, the largest there is"
            problem = f"needs {largest.describe_need(num_tokens)}"
            raise InvalidField("token_ids", problem, limit=limit)
        turn.leave()
        await self._wait(changed.wait())
        return None

    async def _wait(self, something: Awaitable[object]) -> None:
        self.num_waiting += 1
        try:
            await something
        finally:
            self.num_waiting -= 1

    def prompt_ended(self, route: Route) -> None:
        """Its first token has come, or none will."""
        incarnation = route.computes_prompt.incarnation
        self._outstanding_tokens[incarnation] -= route.num_new_tokens
        if not self._outstanding_tokens[incarnation]:
            del self._outstanding_tokens[incarnation]
        self._turns.wake()

    def _note_started(self, route: Route, num_tokens: int) -> None:
        self._outstanding_tokens[route.computes_prompt.incarnation] += route.num_new_tokens
        for worker in (route.prefill, route.decode):
            known = self._known.get(worker.worker_id) if worker is not None else None
            if known is not None:
                known.num_started += 1
                known.num_tokens_started.append(num_tokens)

    async def _locate(
        self, token_ids: list[int], salt: bytes, snapshots: list[WorkerSnapshot]
    ) -> dict[str, int]:
        """Worker id → cached tokens at the front, as the directory has it; one round trip."""
        hits: dict[str, int] = {}
        if self._directory is None or not self.is_directory_reachable:
            return hits
        for capability_hash in {snapshot.capability_hash for snapshot in snapshots}:
            alike = [s for s in snapshots if s.capability_hash == capability_hash]
            root = root_hash(capability_hash, salt=salt)
            listed = boundary_hashes(root, token_ids, alike[0].capacity.block_size)
            if not listed:
                continue
            try:
                holders = await self._directory.prefix_index.lookup(listed)
            except DirectoryUnavailable:
                return hits
            hits.update(longest_run(holders, alike))
        return hits

    def link(self, worker: WorkerSnapshot) -> DecodeLink:
        link = self._links.get(worker.incarnation)
        if link is None:
            hello = decode_service_pb2.DecodeHello(gateway_incarnation=self._incarnation)
            link = DecodeLink(worker.incarnation, worker.address, hello, self._link_broken)
            self._links[worker.incarnation] = link
        return link

    def _link_broken(self, incarnation: str) -> None:
        self._links.pop(incarnation, None)
        self.doubt(incarnation)

    def channel(self, worker: WorkerSnapshot) -> grpc.aio.Channel:
        channel = self._channels.get(worker.address)
        if channel is None:
            channel = self._channels[worker.address] = internal_channel(worker.address)
        return channel

    async def close(self) -> None:
        for link in list(self._links.values()):
            await link.close()
        for channel in self._channels.values():
            await channel.close()
        if self._directory is not None:
            await self._directory.aclose()
