"""Who computes the prompt, and who the answer. Pure: snapshots in, a route out."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
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
    model_digest: str = ""
    prompt_tokens_per_s: int = 0
    """0: not known yet."""
    path_bytes_per_s: Mapping[str, int] = field(default_factory=dict)
    """Rate of the path to a peer that it has read, by worker id."""

    @property
    def num_tokens(self) -> int:
        """Of the longest sequence that the pools could hold, whatever the model's length."""
        return self.capacity.max_tokens(_ANY_LENGTH)

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

    @property
    def workers(self) -> tuple[WorkerSnapshot, ...]:
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)


@dataclass(frozen=True, slots=True)
class LocalPrefill:
    """When a `both` partner computes a prompt itself, with a prefill worker at hand.

    The prefill worker comes first: as long as it keeps up, nothing disturbs the partner's streams.
    A prompt that would make its queue longer than `threshold_tokens` goes to the partner instead,
    whose own queue stays below `max_share` of that queue, since it computes prompts more slowly,
    beside its streams. So prompts wait about equally long on both sides, and a long prompt disturbs
    the streams only where the queue is long.

    With `late_after_s`, a prompt that neither side may take now is held at the gateway, and so are
    those that come after it. When there is room again the oldest one goes, but those held for
    longer than `late_after_s` go after all others (`next_in_turn`): under overload, first come,
    first served would make every prompt late, whereas so most are in time. The late ones go when
    the overload ends, or their deadline ends them.

    A prompt whose blocks and states would take longer to the partner, by the path that it has
    measured, than it takes to compute the prompt there, goes to the partner as well, unless that
    one has the longer queue: with states, which do not grow with the prompt, a short one.

    How much a prompt delays the partner's streams is up to the partner: its token budget, and its
    goal for the time per token.
    """

    threshold_tokens: int
    """Should be at most the prefill rate times (the time to first token that is allowed, less
    `late_after_s`); about half of it where nothing is held."""
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

    The first choice is of the worker that computes the prompt: the one with the fewest tokens to
    compute until that is done, those queued before it and those of it that are not cached there;
    of equals the one with the smallest batch. Prefill workers compute prompts; so do `both` workers
    that no prefill worker of equal capability is there for, and they keep the sequence. A prefill
    worker needs a partner: the `decode` or `both` worker of equal capability with the most free
    room, of equals the one with the smallest batch. When a prefill worker's queue is too long, a
    `both` partner may take the prompt alone (`LocalPrefill`).

    hits: worker id → cached tokens from the prompt's start (`longest_run`).
    num_prompt_tokens: what has to be in the cache before the next token can be drawn.
    num_tokens: of the whole sequence, which the decode worker's pools must hold; those of the
        prefill worker must hold the prompt.
    capability_hash: the only one acceptable, once an attempt has emitted tokens.
    local_prefill: None: prompts never pass the prefill workers by, nor wait for room.
    spread: a counter, by which equal workers are taken in turn.
    """
    firsts, decodes = _candidates(workers, num_prompt_tokens, num_tokens, capability_hash)
    if not firsts:
        return None
    prompt = _Prompt(num_prompt_tokens, hits, local_prefill, spread)
    first = prompt.best_to_compute(firsts)
    if first.role == "both":
        # A doubt lasts seconds: it must not send all that is held to the partner.
        must_wait = prompt.may_be_held and not prompt.has_room(first)
        return None if must_wait and _has_doubted_prefill(first, workers) else prompt.alone(first)
    partners = [worker for worker in decodes if worker.capability_hash == first.capability_hash]
    nearer = prompt.nearer(first, partners)
    if nearer is not None:
        return prompt.alone(nearer)
    if prompt.has_room(first):
        return prompt.pair(first, partners)
    taker = prompt.taker(first, partners)
    if taker is not None:
        return prompt.alone(taker)
    return None if prompt.may_be_held else prompt.pair(first, partners)


def takes_prompts(
    workers: Collection[WorkerSnapshot], *, capability_hash: str | None = None
) -> bool:
    """Whether `choose` finds a route for the shortest of sequences."""
    return bool(_candidates(workers, 1, 1, capability_hash)[0])


def depends_on_hits(
    workers: Collection[WorkerSnapshot],
    num_prompt_tokens: int,
    num_tokens: int,
    *,
    capability_hash: str | None = None,
    local_prefill: LocalPrefill | None = None,
) -> bool:
    """Whether the route may be another one by what is cached where: not if a single worker may
    compute the prompt. Arguments as of `choose`."""
    firsts, _ = _candidates(workers, num_prompt_tokens, num_tokens, capability_hash)
    return len(firsts) > 1 or local_prefill is not None


def _candidates(
    workers: Collection[WorkerSnapshot],
    num_prompt_tokens: int,
    num_tokens: int,
    capability_hash: str | None,
) -> tuple[list[WorkerSnapshot], list[WorkerSnapshot]]:
    """Those that may compute the prompt, and those that may keep the sequence."""
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
    return _able_to_compute(prefills, decodes), decodes


def _able_to_compute(
    prefills: Sequence[WorkerSnapshot], decodes: Sequence[WorkerSnapshot]
) -> list[WorkerSnapshot]:
    """Prefill workers that have a partner, and `both` workers that no prefill worker is there
    for."""
    with_prefill = {worker.capability_hash for worker in prefills}
    with_decode = {worker.capability_hash for worker in decodes}
    return [worker for worker in prefills if worker.capability_hash in with_decode] + [
        worker
        for worker in decodes
        if worker.role == "both" and worker.capability_hash not in with_prefill
    ]


def _has_doubted_prefill(both: WorkerSnapshot, workers: Collection[WorkerSnapshot]) -> bool:
    return any(
        worker.role == "prefill"
        and worker.suspect
        and worker.capability_hash == both.capability_hash
        for worker in workers
    )


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt that looks for its workers; the fields are arguments of `choose`."""

    num_tokens: int
    hits: Mapping[str, int]
    local_prefill: LocalPrefill | None
    spread: int

    @property
    def may_be_held(self) -> bool:
        return self.local_prefill is not None and self.local_prefill.late_after_s is not None

    def num_new_tokens(self, worker: WorkerSnapshot) -> int:
        # A hit never covers the last token: its logits have to be computed.
        return self.num_tokens - min(self.hits.get(worker.worker_id, 0), self.num_tokens - 1)

    def queue_at(self, worker: WorkerSnapshot) -> int:
        """Tokens that the worker has to compute until it has computed this prompt."""
        return worker.num_outstanding_tokens + self.num_new_tokens(worker)

    def has_room(self, worker: WorkerSnapshot) -> bool:
        # However long a prompt is, an idle worker takes it.
        return (
            self.local_prefill is None
            or not worker.num_outstanding_tokens
            or self.queue_at(worker) <= self.local_prefill.threshold_tokens
        )

    def best_to_compute(self, workers: Sequence[WorkerSnapshot]) -> WorkerSnapshot:
        if self.may_be_held:
            workers = [w for w in workers if w.role == "both" or self.has_room(w)] or workers

        def rank(worker: WorkerSnapshot) -> tuple[int, int]:
            # What a worker says of itself is half a second old: it decides between equals only.
            return (self.queue_at(worker), worker.num_waiting + worker.num_running)

        return _best(workers, rank, self.spread)

    def taker(
        self, prefill: WorkerSnapshot, partners: Sequence[WorkerSnapshot]
    ) -> WorkerSnapshot | None:
        """The partner that computes the prompt in place of a prefill worker without room."""
        assert self.local_prefill is not None
        most = self.local_prefill.max_share * self.queue_at(prefill)
        takers = [w for w in partners if w.role == "both" and self.queue_at(w) <= most]
        if not takers:
            return None
        return _best(takers, lambda w: (self.queue_at(w), *_decode_rank(w)), self.spread)

    def nearer(
        self, prefill: WorkerSnapshot, partners: Sequence[WorkerSnapshot]
    ) -> WorkerSnapshot | None:
        """A partner that would compute the prompt sooner than it would read what a prefill worker
        computes of it."""
        if self.local_prefill is None:
            return None
        most = self.queue_at(prefill)
        takers = [
            worker
            for worker in partners
            if worker.role == "both"
            and self.queue_at(worker) <= most
            and self._seconds_to_move(prefill, worker) > self._seconds_to_compute(worker)
        ]
        if not takers:
            return None
        return _best(takers, lambda w: (self.queue_at(w), *_decode_rank(w)), self.spread)

    def _seconds_to_move(self, prefill: WorkerSnapshot, worker: WorkerSnapshot) -> float:
        """0 where the path is not known."""
        rate = worker.path_bytes_per_s.get(prefill.worker_id, 0)
        num_held = min(self.hits.get(worker.worker_id, 0), self.num_tokens)
        return worker.capacity.bytes_to_move(self.num_tokens, num_held) / rate if rate else 0.0

    def _seconds_to_compute(self, worker: WorkerSnapshot) -> float:
        rate = worker.prompt_tokens_per_s
        return self.num_new_tokens(worker) / rate if rate else math.inf

    def alone(self, worker: WorkerSnapshot) -> Route:
        return Route(None, worker, self.num_new_tokens(worker))

    def pair(self, prefill: WorkerSnapshot, partners: Sequence[WorkerSnapshot]) -> Route:
        decode = _best(partners, _decode_rank, self.spread)
        return Route(prefill, decode, self.num_new_tokens(prefill))


def longest_sequence(
    workers: Collection[WorkerSnapshot], length_of: Callable[[Capacity], int]
) -> int | None:
    """Tokens of the longest sequence that some pair of workers, or one alone, serves to its end;
    None while there is no such pair.

    Both must hold all of it: on a new attempt what was answered is part of the prompt.

    length_of: what counts as a worker's longest.
    """
    firsts: dict[str, int] = {}
    lasts: dict[str, int] = {}
    for worker in workers:
        length, key = length_of(worker.capacity), worker.capability_hash
        if worker.role != "decode":
            firsts[key] = max(length, firsts.get(key, 0))
        if worker.role != "prefill":
            lasts[key] = max(length, lasts.get(key, 0))
    return max((min(firsts[key], lasts[key]) for key in firsts.keys() & lasts.keys()), default=None)


def next_in_turn(
    held: Sequence[_Held], since_s: Callable[[_Held], float], now_s: float, late_after_s: float
) -> _Held | None:
    """The next to go of those that are held: the oldest that is not late, else the oldest of all.

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
    """The lowest in rank; equals are taken in turn, in the order of their ids."""
    lowest = min(map(rank, workers))
    equals = sorted(
        (worker for worker in workers if rank(worker) == lowest), key=lambda w: w.worker_id
    )
    return equals[spread % len(equals)]
