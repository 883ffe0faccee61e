"""Who computes the prompt, and who the answer. Pure: snapshots in, a route out."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from baton.shared.kv.block_hash import stride_blocks
from baton.shared.kv.capacity import Capacity

Role = Literal["prefill", "decode", "both"]
_Rank = TypeVar("_Rank", bound=tuple[int, ...])
_Held = TypeVar("_Held")
_ANY_LENGTH = 1 << 31
"""Tokens, more than any sequence has."""


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """A worker as the gateway knows it now."""

    worker_id: str
    incarnation: str
    address: str
    role: Role
    capability_hash: str
    capacity: Capacity
    num_free_blocks: tuple[int, ...]
    """By block pool."""
    num_waiting: int
    num_running: int
    num_outstanding_tokens: int = 0
    """Prompt tokens to compute that this gateway sent there and whose first token has not come."""
    suspect: bool = False
    """Silent, unhealthy or draining: gets nothing new."""

    @property
    def num_free_tokens(self) -> int:
        """Of the longest sequence for which there are free blocks."""
        return self.capacity.max_tokens(_ANY_LENGTH, self.num_free_blocks)


@dataclass(frozen=True, slots=True)
class Route:
    prefill: WorkerSnapshot | None
    """None: the decode worker computes the prompt by itself (`Start` without a source)."""
    decode: WorkerSnapshot
    num_new_tokens: int
    """Prompt tokens that are to be computed, as far as is known: those not cached there."""

    @property
    def computes_prompt(self) -> WorkerSnapshot:
        return self.prefill or self.decode


@dataclass(frozen=True, slots=True)
class LocalPrefill:
    """When a `both` partner computes a prompt itself, with a prefill worker at hand.

    The prefill worker comes first: as long as it keeps up, nothing disturbs the partner's
    streams. What it cannot compute in time spills over: a prompt that would lengthen its queue
    beyond `threshold_tokens`. The partner's own queue stays below `max_share` of that queue, as
    it computes prompts more slowly, beside its streams; so neither side's prompts wait much
    longer than the other's, and a long prompt needs a longer queue before it may disturb.

    With `late_after_s`, a prompt that neither side may take now is held at the gateway, and so is
    what comes behind it. When there is room again the oldest goes first, but those held longer
    than that go after all others (`next_in_turn`): under overload, first come, first served makes
    every prompt late; so most are in time, and the late ones are computed when there is time:
    without a deadline they wait for as long as the overload lasts.

    How much a prompt delays the partner's streams is the partner's matter: its token budget, and
    its goal for the time per token.
    """

    threshold_tokens: int
    """At most the time to first token that is allowed, less `late_after_s`, times the prefill
    rate; about half of it where nothing is held."""
    max_share: float = 0.25
    late_after_s: float | None = None
    """None: nothing is held."""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if self.threshold_tokens < 0:
            raise ValueError(
                f"--local-prefill-tokens must not be negative, not {self.threshold_tokens}"
            )
        if not 0 <= self.max_share <= 1:
            raise ValueError(f"--local-prefill-share must be from 0 to 1, not {self.max_share}")
        if self.late_after_s is not None and not 0 <= self.late_after_s < math.inf:
            raise ValueError(f"--late-after-s must be seconds from 0 on, not {self.late_after_s}")


def choose(
    workers: Collection[WorkerSnapshot],
    hits: Mapping[str, int],
    num_prompt_tokens: int,
    num_tokens: int,
    *,
    capability_hash: str | None = None,
    local_prefill: LocalPrefill | None = None,
    spread: int = 0,
) -> Route | None:
    """The route of one attempt; None when it must wait for a worker, or for room at one.

    First the worker that computes the prompt: the fewest tokens until that is done, those queued
    before it and those of it that are not cached there; then the smallest batch. Prefill workers
    do that; a `both` worker does where its capability has none that could, and then keeps the
    sequence. Otherwise the prefill worker's partner follows: a `decode` or `both` worker of equal
    capability, most free room, then smallest batch. When the queue of the prefill worker is too
    long, a `both` partner may take the prompt alone (`LocalPrefill`).

    hits: worker id → cached tokens from the prompt's start (`longest_run`).
    num_prompt_tokens: what has to be in the cache before the next token can be drawn.
    num_tokens: of the whole sequence; pools that cannot hold it are left out. The prefill worker's
        must hold the prompt.
    capability_hash: the only one acceptable, once an attempt has emitted tokens.
    local_prefill: None: a prompt never goes around the prefill workers, nor waits for room.
    spread: a counter; successive values take equal workers in turn.
    """
    usable = [
        worker
        for worker in workers
        if not worker.suspect and capability_hash in (None, worker.capability_hash)
    ]
    prefills = [
        worker
        for worker in usable
        if worker.role == "prefill" and worker.capacity.holds(num_prompt_tokens)
    ]
    decodes = [
        worker
        for worker in usable
        if worker.role != "prefill" and worker.capacity.holds(num_tokens)
    ]
    with_prefill = {worker.capability_hash for worker in prefills}
    with_decode = {worker.capability_hash for worker in decodes}
    firsts = [worker for worker in prefills if worker.capability_hash in with_decode] + [
        worker
        for worker in decodes
        if worker.role == "both" and worker.capability_hash not in with_prefill
    ]
    if not firsts:
        return None

    def num_new_tokens(worker: WorkerSnapshot) -> int:
        # A hit never covers the last token: its logits have to be computed.
        return num_prompt_tokens - min(hits.get(worker.worker_id, 0), num_prompt_tokens - 1)

    def queue_with_it(worker: WorkerSnapshot) -> int:
        return worker.num_outstanding_tokens + num_new_tokens(worker)

    def prefill_rank(worker: WorkerSnapshot) -> tuple[int, int]:
        # What a worker says of itself is half a second old: it decides between equals only.
        return (queue_with_it(worker), worker.num_waiting + worker.num_running)

    def alone(worker: WorkerSnapshot) -> Route:
        return Route(None, worker, num_new_tokens(worker))

    def has_room(worker: WorkerSnapshot) -> bool:
        # However long a prompt is, an idle worker takes it.
        return (
            local_prefill is None
            or not worker.num_outstanding_tokens
            or queue_with_it(worker) <= local_prefill.threshold_tokens
        )

    may_hold = local_prefill is not None and local_prefill.late_after_s is not None
    if may_hold:
        firsts = [w for w in firsts if w.role == "both" or has_room(w)] or firsts
    first = _best(firsts, prefill_rank, spread)
    if first.role == "both":
        # A doubt lasts seconds: it must not send all that is held to the partner.
        is_pair = any(
            w.role == "prefill" and w.suspect and w.capability_hash == first.capability_hash
            for w in workers
        )
        return None if may_hold and is_pair and not has_room(first) else alone(first)
    partners = [worker for worker in decodes if worker.capability_hash == first.capability_hash]
    if local_prefill is not None and not has_room(first):
        most = local_prefill.max_share * queue_with_it(first)
        takers = [w for w in partners if w.role == "both" and queue_with_it(w) <= most]
        if takers:
            return alone(_best(takers, lambda w: (queue_with_it(w), *_decode_rank(w)), spread))
        if may_hold:
            return None
    return Route(first, _best(partners, _decode_rank, spread), num_new_tokens(first))


def next_in_turn(
    held: Sequence[_Held], since_s: Callable[[_Held], float], now_s: float, late_after_s: float
) -> _Held | None:
    """Who goes next of those that are held: the oldest that is not late, else the oldest.

    held: oldest first, by the time `since_s` gives.
    """
    num_late = bisect_left(held, now_s - late_after_s, key=since_s)
    return next(iter(held[num_late : num_late + 1] or held[:1]), None)


def longest_run(
    boundary_holders: Sequence[Mapping[str, str]], workers: Collection[WorkerSnapshot]
) -> dict[str, int]:
    """Cached tokens from the prompt's start, for each worker that has some.

    boundary_holders: for each hash that the directory lists (`boundary_hashes`), in order, its
        holders as worker id → incarnation. What an earlier incarnation held is gone.
    """
    runs = {}
    for worker in workers:
        deepest = 0
        for number, holders in enumerate(boundary_holders, 1):
            if holders.get(worker.worker_id) == worker.incarnation:
                deepest = number
        if deepest:
            block_size = worker.capacity.block_size
            runs[worker.worker_id] = deepest * stride_blocks(block_size) * block_size
    return runs


def _decode_rank(worker: WorkerSnapshot) -> tuple[int, int]:
    return (-worker.num_free_tokens, worker.num_running + worker.num_waiting)


def _best(
    workers: Sequence[WorkerSnapshot], rank: Callable[[WorkerSnapshot], _Rank], spread: int
) -> WorkerSnapshot:
    """The lowest in rank; of equals, the one whose turn it is in the order of their ids."""
    lowest = min(map(rank, workers))
    equals = sorted(
        (worker for worker in workers if rank(worker) == lowest), key=lambda w: w.worker_id
    )
    return equals[spread % len(equals)]
