"""The route of each attempt: found at once, or waited for.

    locate ─► choose ─► a route          (of a further sample: beside the first, if there is room)
                 ├────► or it waits for room: held at the gateway until its turn comes (turns.py)
                 └────► or it waits for news of the workers

`choose` (router.py) is pure; here is what it is told, and what follows from its answer.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from baton.services.gateway.router import (
    LocalPrefill,
    Route,
    WorkerSnapshot,
    choose,
    depends_on_hits,
    longest_run,
    longest_sequence,
    takes_prompts,
)
from baton.services.gateway.served_model import ServedModel
from baton.services.gateway.shared_prompt import Beside
from baton.services.gateway.turns import Turn, Turns
from baton.services.gateway.workers import Workers
from baton.shared.kv.block_hash import KnownHashes, boundary_hashes, root_hash
from baton.shared.rpc.errors import InvalidField

Lookup = Callable[[list[bytes]], Awaitable[Sequence[Mapping[str, str]] | None]]
"""Listed hashes → who holds each, as worker id → incarnation; None while the directory is away."""


class Wait(enum.Enum):
    """For what an attempt waits that has no route now."""

    ROOM = enum.auto()
    """It is held: until a worker has room, and its turn has come."""
    NEWS = enum.auto()
    """Something about the workers has to change."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a route is wanted for; the fields are arguments of `Routing.route`."""

    token_ids: list[int]
    num_new_tokens: int
    capability_hash: str | None
    salt: bytes
    may_hold: bool
    has_begun: bool
    begun_on: str | None
    beside: Beside | None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_new_tokens

    def hits_beside(self, workers: Sequence[WorkerSnapshot]) -> dict[str, int]:
        """Worker id → tokens of the prompt that are cached there, of those that the other sample
        is at."""
        if self.beside is None:
            return {}
        incarnations = {worker.incarnation for worker in self.beside.route.workers}
        num_common = min(self.beside.num_prompt_tokens, len(self.token_ids) - 1)
        return {
            worker.worker_id: num_common - num_common % worker.capacity.block_size
            for worker in workers
            if worker.incarnation in incarnations
        }


class Routing:
    def __init__(
        self,
        workers: Workers,
        served: ServedModel,
        lookup: Lookup,
        local_prefill: LocalPrefill | None,
    ) -> None:
        """`workers` is told which routes are taken."""
        self._workers = workers
        self._served = served
        self._lookup = lookup
        self._known_hashes = KnownHashes()
        self._local_prefill = local_prefill
        late_after_s = local_prefill.late_after_s if local_prefill is not None else None
        self._may_hold = late_after_s is not None
        self._turns = Turns(late_after_s or 0.0)
        self.num_waiting = 0
        """Attempts for which there is no worker, or no room at one, now."""
        self._changed = asyncio.Event()
        self._spread = 0

    def look_again(self) -> None:
        """Something about the workers may have changed."""
        self._changed.set()
        self._changed = asyncio.Event()
        self._turns.wake()

    async def route(
        self,
        token_ids: list[int],
        num_new_tokens: int,
        capability_hash: str | None,
        *,
        salt: bytes = b"",
        has_begun: bool = False,
        begun_on: str | None = None,
        beside: Beside | None = None,
    ) -> Route:
        """Locates the prompt's prefixes and chooses; waits as long as no worker can take it.

        `salt` is that of the prompt's block hashes: only prefixes with the same one are found.

        An answer that has begun, of which its reader has tokens, is never held; `begun_on` is the
        digest of the model that these came from. With `beside` the
        route is that of the other sample, if its workers take another and have room.

        `prompt_ended` has to be called for the route, once.

        Raises InvalidField when no pool will ever hold it, and ModelReplaced when the cluster
        serves another model.
        """
        may_hold = self._may_hold and not has_begun
        wanted = _Wanted(
            token_ids, num_new_tokens, capability_hash, salt, may_hold, has_begun, begun_on, beside
        )
        with self._turns.turn() as turn:
            while True:
                changed = self._changed
                found = await self._find(wanted, turn)
                if isinstance(found, Route):
                    return found
                if found is Wait.NEWS:
                    turn.leave()
                await self._wait(turn.hold() if found is Wait.ROOM else changed.wait())

    async def _find(self, wanted: _Wanted, turn: Turn) -> Route | Wait:
        """The route as things are now, noted as started, or for what to wait."""
        self._served.check(wanted.begun_on)
        snapshots = self._workers.snapshots()
        if not takes_prompts(snapshots, capability_hash=wanted.capability_hash):
            # No worker takes prompts now. Held prompts need not all look again at each news: they
            # wait in line, and go one by one when there is a worker.
            return Wait.ROOM if wanted.may_hold else Wait.NEWS
        if wanted.beside and (route := self._choose_beside(wanted, snapshots)) is not None:
            return self._take(route, wanted)
        hits = wanted.hits_beside(snapshots)
        if self._depends_on_hits(wanted, snapshots):
            hits = {**await self._locate(wanted, snapshots), **hits}
            # Others may have been sent meanwhile.
            snapshots = self._workers.snapshots()
        # Until the route is noted nothing else runs.
        in_time = self._choose(wanted, snapshots, hits, self._local_prefill)
        route = in_time or self._choose(wanted, snapshots, hits, None)
        if route is None:
            _check_fits(wanted, snapshots)
            return Wait.NEWS
        if wanted.may_hold and not (in_time and turn.has_come):
            return Wait.ROOM
        return self._take(route, wanted)

    def _take(self, route: Route, wanted: _Wanted) -> Route:
        self._spread += 1
        # What another sample holds there takes no room.
        held = wanted.hits_beside(route.workers)
        num_held = min(held.get(worker.worker_id, 0) for worker in route.workers)
        self._workers.started(route, len(wanted.token_ids) - num_held)
        return route

    def _choose_beside(self, wanted: _Wanted, snapshots: list[WorkerSnapshot]) -> Route | None:
        """Where the prompt is: the workers of the other sample, or with the prefill worker of it
        another one, if its partner has no room for an answer by its last word."""
        hits = wanted.hits_beside(snapshots)
        near = [worker for worker in snapshots if worker.worker_id in hits]
        route = self._choose(wanted, near, hits, None)
        if route is not None and route.decode.num_free_tokens >= wanted.num_new_tokens:
            return route
        if not any(worker.role == "prefill" for worker in near):
            return None
        near += [each for each in snapshots if each.role != "prefill" and each not in near]
        return self._choose(wanted, near, hits, None)

    def _depends_on_hits(self, wanted: _Wanted, snapshots: list[WorkerSnapshot]) -> bool:
        return depends_on_hits(
            snapshots,
            len(wanted.token_ids),
            wanted.num_tokens,
            capability_hash=wanted.capability_hash,
            local_prefill=self._local_prefill,
        )

    def _choose(
        self,
        wanted: _Wanted,
        snapshots: list[WorkerSnapshot],
        hits: dict[str, int],
        local_prefill: LocalPrefill | None,
    ) -> Route | None:
        return choose(
            snapshots,
            hits,
            len(wanted.token_ids),
            wanted.num_tokens,
            capability_hash=wanted.capability_hash,
            local_prefill=local_prefill,
            spread=self._spread,
        )

    async def _locate(self, wanted: _Wanted, snapshots: list[WorkerSnapshot]) -> dict[str, int]:
        """Worker id → cached tokens at the front, as the directory has it; one round trip for each
        capability."""
        hits: dict[str, int] = {}
        for capability_hash in {snapshot.capability_hash for snapshot in snapshots}:
            alike = [s for s in snapshots if s.capability_hash == capability_hash]
            root = root_hash(capability_hash, salt=wanted.salt)
            block_size = alike[0].capacity.block_size
            listed = boundary_hashes(root, wanted.token_ids, block_size, self._known_hashes)
            holders = await self._lookup(listed) if listed else None
            if holders is not None:
                hits.update(longest_run(holders, alike))
        return hits

    async def _wait(self, something: Awaitable[object]) -> None:
        self.num_waiting += 1
        try:
            await something
        finally:
            self.num_waiting -= 1

    def prompt_ended(self, route: Route) -> None:
        """Its first token has come, or none will."""
        self._workers.prompt_ended(route)
        self._turns.wake()


def _check_fits(wanted: _Wanted, snapshots: list[WorkerSnapshot]) -> None:
    """Raises InvalidField when no workers hold the sequence together.

    An answer that has begun was admitted when there were some: they may come back.
    """
    num_tokens = wanted.num_tokens
    if not snapshots or any(s.capacity.holds(num_tokens) for s in snapshots):
        longest = longest_sequence(snapshots, lambda capacity: capacity.longest)
        if wanted.has_begun or longest is None or longest >= num_tokens:
            return
        limit = f"prompt and answer together {longest}, the longest that workers share"
        raise InvalidField("token_ids", f"needs {num_tokens} tokens", limit=limit)
    largest = max((s.capacity for s in snapshots), key=lambda capacity: capacity.longest)
    limit = f"{largest.describe(num_tokens)}, the most there is"
    problem = f"needs {largest.describe_need(num_tokens)}"
    raise InvalidField("token_ids", problem, limit=limit)
