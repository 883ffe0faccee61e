"""Pulls blocks and checks their digests, off the engine's thread.

    submit ──► queue ──► read a piece ──► sum what landed ──► … ──► on_done
                              │ fails, or the peer was dropped        ▲
                              └───────────────────────────────────────┘

One thread owns the connections. Every job that was submitted is answered once, in the order of
submission; when it is answered, nothing of it lands any more. Where a transport's reads go on by
themselves, a piece is summed while the next one is read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from queue import SimpleQueue
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from baton.shared.kv.digest import Uint64Array, block_sums, digests, seeds
from baton.shared.telemetry import log_event
from baton.shared.transfer.interface import (
    BlockCopy,
    KvTransport,
    LocalPool,
    OverlappingConnection,
    PeerConnection,
    TransferError,
)
from baton.v1.kv_service_pb2 import PoolDescription

log = logging.getLogger(__name__)

# Small enough to be summed while still in the processor's cache.
_PIECE_BYTES = 1 << 20
# Large enough that a GPU's launches and a transport's start don't count.
_DEVICE_PIECE_BYTES = 64 << 20

SumBlocks = Callable[[Sequence[int], int], Uint64Array]
"""Local block ids, cache group → [ids, num_heads], what `block_sums` gives for these blocks."""


@runtime_checkable
class OverlappingSums(Protocol):
    """Sums that leave the thread free."""

    def start(self, block_ids: Sequence[int], group: int) -> Callable[[], Uint64Array]:
        """Begins what SumBlocks does; what is returned waits for it."""


class ExpectedBlock(NamedTuple):
    """What the owner announced of one sealed block."""

    remote_block_id: int
    generation: int
    digests: tuple[int, ...]
    """One for each head, unsigned."""


@dataclass(frozen=True, slots=True)
class PullJob:
    """`expected[i]` is what `copies[i]` should bring."""

    job_id: int
    peer: PoolDescription
    group: int
    """The cache group that the blocks are of."""
    copies: Sequence[BlockCopy]
    expected: Sequence[ExpectedBlock]


@dataclass(frozen=True, slots=True)
class PullResult:
    job_id: int
    mismatched: tuple[int, ...]
    """Indices into the job's copies whose bytes are not those that were sealed."""
    local_sums: Uint64Array
    """[copies, num_heads], of what landed, without seeds; none when there was an error."""
    error: str | None
    """Why the blocks could not be read; None when all have landed."""
    started_s: float
    finished_s: float
    """On the monotonic clock."""


class _Drop(NamedTuple):
    incarnation: str


class _Stop:
    pass


class Puller:
    """`on_done` is called from the puller's thread, once a job, and must not block.

    `sum_blocks`: how to sum blocks of the local pool; called from the puller's thread, for a GPU's
    pool with a stream of that thread's own as the current one. What can start sums and take them
    later (OverlappingSums) sums a piece on the device while the thread starts the next read.
    """

    def __init__(
        self,
        transport: KvTransport,
        pool: LocalPool,
        on_done: Callable[[PullResult], None],
        sum_blocks: SumBlocks | OverlappingSums | None = None,
    ) -> None:
        self._transport = transport
        self._pool = pool
        self._words = [pool.words(group) for group in range(len(pool.groups))]
        self._on_done = on_done
        self._sum_blocks: SumBlocks | OverlappingSums = sum_blocks or self._sum_by_torch
        self._connections: dict[str, PeerConnection] = {}
        self._queue: SimpleQueue[PullJob | _Drop | _Stop] = SimpleQueue()
        # Drops still in the queue, by incarnation: jobs in front of one fail at once.
        self._num_drops: dict[str, int] = {}
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="puller", daemon=True)
        self._thread.start()

    def submit(self, job: PullJob) -> None:
        """`RuntimeError` after `close`."""
        with self._lock:
            if self._closed:
                raise RuntimeError("puller is closed")
            self._queue.put(job)

    def drop_peer(self, incarnation: str) -> None:
        """Jobs submitted before this fail, then the connection is closed. Jobs submitted later
        connect anew."""
        with self._lock:
            self._num_drops[incarnation] = self._num_drops.get(incarnation, 0) + 1
            self._queue.put(_Drop(incarnation))

    def rates(self) -> dict[str, float]:
        """Bytes per second by the incarnation of each connected peer, as measured."""
        return {name: peer.bytes_per_second for name, peer in self._connections.copy().items()}

    def close(self) -> None:
        """Fails what is queued, closes every connection and joins the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(_Stop())
        self._thread.join()

    def _run(self) -> None:
        device = self._pool.memory.device
        if device.type == "cuda":
            with torch.cuda.device(device), torch.cuda.stream(_new_stream(device)):
                self._take_jobs()
        else:
            self._take_jobs()

    def _take_jobs(self) -> None:
        while not isinstance(message := self._queue.get(), _Stop):
            if isinstance(message, _Drop):
                self._disconnect(message.incarnation)
                with self._lock:
                    self._num_drops[message.incarnation] -= 1
                    if not self._num_drops[message.incarnation]:
                        del self._num_drops[message.incarnation]
            else:
                self._answer(message)
        for incarnation in list(self._connections):
            self._disconnect(incarnation)

    def _answer(self, job: PullJob) -> None:
        started_s = time.monotonic()
        sums: Uint64Array = np.empty((0, 0), dtype=np.uint64)
        mismatched: tuple[int, ...] = ()
        error: str | None = None
        try:
            sums, mismatched = self._pull(job)
        except TransferError as failure:
            error = str(failure)
            self._disconnect(job.peer.incarnation)
        except Exception as failure:
            log_event(
                log,
                logging.ERROR,
                "pull failed",
                exc_info=True,
                job=job.job_id,
                pool=job.peer.incarnation,
            )
            error = f"{type(failure).__name__}: {failure}"
            self._disconnect(job.peer.incarnation)
        result = PullResult(job.job_id, mismatched, sums, error, started_s, time.monotonic())
        try:
            self._on_done(result)
        except Exception:
            log_event(
                log, logging.ERROR, "result of a pull not taken", exc_info=True, job=job.job_id
            )

    def _pull(self, job: PullJob) -> tuple[Uint64Array, tuple[int, ...]]:
        """Reads a job's blocks → their sums, and the columns of those that are not as announced."""
        _check_job(job, self._pool)
        pieces = self._pieces(job)
        if not pieces:
            return np.empty((0, self._pool.groups[job.group].num_heads), dtype=np.uint64), ()
        wait = self._start(job, *pieces[0])
        # The first blocks are on their way meanwhile.
        wanted = self._announced(job)
        summed: list[Callable[[], Uint64Array]] = []
        for (start, end), following in zip(pieces, [*pieces[1:], None], strict=True):
            wait()
            if following is not None:
                wait = self._start(job, *following)
            local_ids = [copy.local_block_id for copy in job.copies[start:end]]
            summed.append(self._start_sums(local_ids, job.group))
        sums = np.concatenate([take() for take in summed])
        seed, announced = wanted
        wrong = (digests(sums, seed) != announced).any(axis=1)
        return sums, tuple(np.flatnonzero(wrong).tolist())

    def _start(self, job: PullJob, start: int, end: int) -> Callable[[], None]:
        """Begins to read a piece, where the transport can; what is returned waits for its end."""
        self._check_not_dropped(job)
        incarnation, copies = job.peer.incarnation, job.copies[start:end]
        give_up = partial(self._is_dropped, incarnation)
        connection = self._connections.get(incarnation)
        if connection is None:
            connection = self._transport.connect(job.peer, give_up)
            self._connections[incarnation] = connection
        if isinstance(connection, OverlappingConnection):
            return partial(connection.start(job.group, copies).wait, give_up)

        def read() -> None:
            self._check_not_dropped(job)
            connection.read(job.group, copies)

        return read

    def _check_not_dropped(self, job: PullJob) -> None:
        if self._is_dropped(job.peer.incarnation):
            raise TransferError(f"pool {job.peer.incarnation} was dropped")

    def _is_dropped(self, incarnation: str) -> bool:
        return self._closed or incarnation in self._num_drops

    def _disconnect(self, incarnation: str) -> None:
        connection = self._connections.pop(incarnation, None)
        if connection is None:
            return
        try:
            connection.close()
        except Exception:
            # The thread must live: every job is answered.
            log_event(
                log, logging.ERROR, "closing a connection failed", exc_info=True, pool=incarnation
            )

    def _announced(self, job: PullJob) -> tuple[Uint64Array, Uint64Array]:
        """Seeds and digests of the job's blocks, each [copies, num_heads]."""
        num_heads = self._pool.groups[job.group].num_heads
        seed = seeds(
            job.peer.incarnation,
            [block.remote_block_id for block in job.expected],
            [block.generation for block in job.expected],
            num_heads,
        )
        values = chain.from_iterable(block.digests for block in job.expected)
        announced = np.fromiter(values, np.uint64, len(job.expected) * num_heads)
        return seed, announced.reshape(-1, num_heads)

    def _pieces(self, job: PullJob) -> list[tuple[int, int]]:
        """Ranges of copies that are read and summed together."""
        num_copies = len(job.copies)
        piece_bytes = _DEVICE_PIECE_BYTES if self._pool.memory.is_cuda else _PIECE_BYTES
        stride = max(1, piece_bytes // self._pool.groups[job.group].block_bytes)
        return [(start, min(start + stride, num_copies)) for start in range(0, num_copies, stride)]

    def _start_sums(self, block_ids: Sequence[int], group: int) -> Callable[[], Uint64Array]:
        sum_blocks = self._sum_blocks
        if isinstance(sum_blocks, OverlappingSums):
            return sum_blocks.start(block_ids, group)
        sums = sum_blocks(block_ids, group)
        return lambda: sums

    def _sum_by_torch(self, block_ids: Sequence[int], group: int) -> Uint64Array:
        words = self._words[group]
        if len(block_ids) == 1:
            return block_sums(words[block_ids[0]].unsqueeze(0))
        return block_sums(torch.stack([words[block_id] for block_id in block_ids]))


def _check_job(job: PullJob, pool: LocalPool) -> None:
    """`TransferError` unless there is a digest for each head of each copy."""
    if not 0 <= job.group < min(len(pool.groups), len(job.peer.groups)):
        raise TransferError(f"pull {job.job_id}: there is no cache group {job.group}")
    num_heads = pool.groups[job.group].num_heads
    if [copy.remote_block_id for copy in job.copies] != [
        block.remote_block_id for block in job.expected
    ] or any(len(block.digests) != num_heads for block in job.expected):
        raise TransferError(f"pull {job.job_id}: announcement and copies do not fit together")


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
