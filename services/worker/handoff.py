"""The hand-off: blocks that one worker computed become another's. Engine side, no streams here.

         reader (decode)                                owner (prefill)
    ClaimBlocks           ──────────────►   Claim       may come before its sequence: waits 5 s
                          ◄──────────────   ClaimAdmitted       room for the whole prompt
    takes room for the whole prompt
                          ◄──────────────   AnnounceBlocks …    sealed, chunk by chunk
    pulls and verifies what it lacks
                          ◄──────────────   AnnounceBlocks + PromptComputed    tail and states too
    ReleaseClaim          ──────────────►   gives the blocks back
                          ◄──────────────   ClaimReleased(held)
    joins the running batch

CancelClaim, ClaimFailed, a lost peer or a digest that does not match end it on both sides. The
reader takes room only after the owner has, so two full pools never wait for each other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count

from baton.services.worker.messages import Outgoing, Peer, ToReader, ToSource
from baton.services.worker.sealing import Sealer
from baton.shared.kv.block_pool import Digest, DigestRow
from baton.shared.kv.capacity import num_blocks_for
from baton.shared.kv.digest import Uint64Array
from baton.shared.kv.drawn import Drawn
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import AttemptKey, Place, Sequence
from baton.shared.rpc.convert import key_from_pb, key_to_pb, logprobs_from_pb, logprobs_to_pb
from baton.shared.rpc.errors import (
    BatonError,
    ClaimBroken,
    DigestMismatch,
    EngineFailure,
    SourceLost,
    from_failure,
    to_failure,
)
from baton.shared.telemetry import Counters, Trace, log_event
from baton.shared.transfer.interface import BlockCopy
from baton.shared.transfer.puller import ExpectedBlock, PullJob, PullResult
from baton.v1 import kv_service_pb2 as kv

logger = logging.getLogger(__name__)

CLAIM_WAITS_S = 5.0
"""A claim waits so long for its sequence; sealed blocks wait so long for a claim."""


# The owner's side


@dataclass(slots=True)
class Claim:
    """A reader's hold on the blocks of one sequence; the sequence keeps the references."""

    key: AttemptKey
    reader: str
    since: float
    num_announced: int = 0


class ClaimTable:
    """Which sequences are claimed by whom, and what their readers have been told."""

    def __init__(
        self, pools: Pools, sealer: Sealer, emit: Callable[[Outgoing], None], trace: Trace
    ) -> None:
        self._pools = pools
        self._sealer = sealer
        self._emit = emit
        self._trace = trace
        self._claims: dict[AttemptKey, Claim] = {}

    def __len__(self) -> int:
        return len(self._claims)

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._claims

    def add(self, key: AttemptKey, reader: str) -> None:
        self._claims[key] = Claim(key, reader, time.monotonic())

    def tell_admitted(self, key: AttemptKey) -> None:
        claim = self._claims.get(key)
        if claim is not None:
            admitted = kv.ClaimAdmitted(key=key_to_pb(key))
            self._emit(ToReader(claim.reader, kv.HoldResponse(admitted=admitted)))

    def announce(self, sequence: Sequence) -> None:
        """Tells the reader of blocks sealed since the last call; of the tail, and the first
        token, when the prompt is computed."""
        claim = self._claims.get(sequence.key)
        if claim is None:
            return
        computed = bool(sequence.output_token_ids)
        num_tokens, block_size = sequence.num_prompt_tokens, self._pools.block_size
        end = num_blocks_for(num_tokens, block_size)
        end = end if computed else min(end, sequence.num_sealed_blocks)
        if claim.num_announced == end and not computed:
            return
        for group, table in enumerate(sequence.block_tables):
            is_last = computed and group == len(sequence.block_tables) - 1
            new = self._new_to_reader(group, num_tokens, claim.num_announced, end, computed)
            if not new and not is_last:
                continue
            message = self._announcement(sequence.key, group, table, new)
            if is_last:
                message.computed.first_token_id = sequence.output_token_ids[0]
                if sequence.first_logprobs is not None:
                    told = logprobs_to_pb(sequence.first_logprobs)
                    message.computed.first_logprobs.CopyFrom(told)
            self._emit(ToReader(claim.reader, kv.HoldResponse(announce=message)))
        self._trace.emit(
            "announced", key=sequence.key, first=claim.num_announced, end=end, computed=computed
        )
        claim.num_announced = end

    def _new_to_reader(
        self, group: int, num_tokens: int, num_announced: int, end: int, computed: bool
    ) -> range:
        """Places in a table of what a reader was not told of, and reads."""
        of_group = self._pools.groups[group]
        if not of_group.spec.grows:
            # A state is final when the prompt is.
            return range(1 if computed else 0)
        # What no token behind the prompt reads stays here.
        first = of_group.first_block(num_tokens, self._pools.block_size)
        return range(max(first, num_announced), end)

    def _announcement(
        self, key: AttemptKey, group: int, table: list[int], indices: range
    ) -> kv.AnnounceBlocks:
        block_ids = [table[index] for index in indices]
        digests = self._sealer.digests_to_announce(group, block_ids)
        return kv.AnnounceBlocks(
            key=key_to_pb(key),
            group=group,
            block_indices=indices,
            block_ids=block_ids,
            generations=self._pools.of(group).generations(block_ids),
            digests=[value for digest in digests for value in digest],
        )

    def holds(self, key: AttemptKey, reader: str) -> bool:
        """Whether the claim has held until now. Any thread may ask: it is one look into a dict,
        which a claim leaves before the first of its blocks is let go."""
        claim = self._claims.get(key)
        return claim is not None and claim.reader == reader

    def answer_release(self, key: AttemptKey, reader: str) -> kv.HoldResponse:
        """Whether the claim held throughout, from any thread: the reader's stream must not wait
        for a step of the owner. The claim itself ends on the engine's thread."""
        held = self.holds(key, reader)
        return kv.HoldResponse(released=kv.ClaimReleased(key=key_to_pb(key), held=held))

    def release(self, key: AttemptKey, reader: str) -> bool:
        """The reader is done; whether it had a claim."""
        held = self.holds(key, reader)
        if held:
            del self._claims[key]
        return held

    def fail(self, key: AttemptKey, error: BatonError) -> None:
        claim = self._claims.pop(key, None)
        if claim is not None:
            self.refuse(key, claim.reader, error)

    def refuse(self, key: AttemptKey, reader: str, error: BatonError) -> None:
        failed = kv.ClaimFailed(key=key_to_pb(key), failure=to_failure(error))
        self._emit(ToReader(reader, kv.HoldResponse(failed=failed)))

    def forget(self, key: AttemptKey) -> None:
        self._claims.pop(key, None)

    def of_reader(self, reader: str) -> list[AttemptKey]:
        return [key for key, claim in self._claims.items() if claim.reader == reader]

    def older_than(self, then: float) -> list[AttemptKey]:
        return [key for key, claim in self._claims.items() if claim.since < then]


# The reader's side


@dataclass(slots=True)
class Pull:
    """A sequence whose prompt another worker computes."""

    sequence: Sequence
    source: Peer
    is_admitted: bool = False
    """By the owner."""
    announced: dict[Place, ExpectedBlock] = field(default_factory=dict)
    """Not asked for yet."""
    missing: set[Place] = field(default_factory=set)
    """Not verified yet; known once there is room here."""
    landed: dict[Place, DigestRow] = field(default_factory=dict)
    """Verified, and not sealed yet: a block is sealed behind all before it, when the prompt is
    computed."""
    first_token: Drawn | None = None
    computed_at: float = 0.0
    transfer_s: float = 0.0
    num_pulled_blocks: int = 0
    num_pulled_bytes: int = 0
    is_released: bool = False


@dataclass(slots=True)
class _Job:
    key: AttemptKey
    group: int
    places: list[Place]
    local_block_ids: list[int]
    expected: list[ExpectedBlock]
    block_bytes: int


class PullTable:
    """Pulls in progress. What goes wrong with one is raised as an AttemptFailed."""

    def __init__(
        self,
        pools: Pools,
        sealer: Sealer,
        submit: Callable[[PullJob], None],
        emit: Callable[[Outgoing], None],
        counters: Counters,
        trace: Trace,
    ) -> None:
        self._pools = pools
        self._sealer = sealer
        self._submit = submit
        self._emit = emit
        self._counters = counters
        self._trace = trace
        self._pulls: dict[AttemptKey, Pull] = {}
        self._jobs: dict[int, _Job] = {}
        self._job_ids = count(1)
        self._descriptions: dict[str, kv.PoolDescription] = {}

    def __len__(self) -> int:
        return len(self._pulls)

    def get(self, key: AttemptKey) -> Pull | None:
        return self._pulls.get(key)

    def start(self, sequence: Sequence, source: Peer) -> None:
        self._pulls[sequence.key] = Pull(sequence, source)
        claim = kv.ClaimBlocks(key=key_to_pb(sequence.key), sequence_blocks=kv.SequenceBlocks())
        self._emit(ToSource(source, kv.HoldRequest(claim=claim)))

    def forget_source(self, source: Peer) -> None:
        """Its stream is gone: so is the description of its pool."""
        self._descriptions.pop(source.incarnation, None)

    def of_source(self, source: Peer) -> list[Pull]:
        return [
            pull for pull in self._pulls.values() if pull.source.incarnation == source.incarnation
        ]

    def took_room(self, pull: Pull, missing: set[Place]) -> None:
        """The sequence has its block tables; `missing`: all of it that is not held here."""
        pull.missing = missing
        self._pull_announced(pull)
        self._release_when_complete(pull)

    @staticmethod
    def key_in(message: kv.HoldResponse) -> AttemptKey:
        """Of any message but hello and tick."""
        kind = message.WhichOneof("message") or ""
        return key_from_pb(getattr(message, kind).key)

    def on_message(self, source: Peer, message: kv.HoldResponse) -> Pull | None:
        """Takes a message of an owner; returns a pull that is complete and released."""
        kind = message.WhichOneof("message")
        if kind == "hello":
            self._descriptions[source.incarnation] = message.hello.pool
            return None
        if kind is None or kind == "tick":
            return None
        key = self.key_in(message)
        pull = self._pulls.get(key)
        if pull is None or pull.source.incarnation != source.incarnation:
            return None
        if kind == "admitted":
            pull.is_admitted = True
        elif kind == "announce":
            self._on_announce(pull, message.announce)
        elif kind == "failed":
            error = from_failure(message.failed.failure)
            if isinstance(error, DigestMismatch | EngineFailure):
                raise error
            raise ClaimBroken(f"ended by its owner: {error.message}")
        elif kind == "released":
            if not message.released.held or not pull.is_released:
                raise ClaimBroken("the claim did not hold until release")
            del self._pulls[key]
            return pull
        return None

    def _on_announce(self, pull: Pull, message: kv.AnnounceBlocks) -> None:
        group, num_blocks = message.group, len(message.block_indices)
        description = self._descriptions.get(pull.source.incarnation)
        if not (
            description is not None
            and group < len(description.groups) == len(self._pools.groups)
            and num_blocks == len(message.block_ids) == len(message.generations)
            and num_blocks * description.groups[group].num_heads == len(message.digests)
        ):
            raise ClaimBroken("an announcement that makes no sense")
        num_heads, digests = description.groups[group].num_heads, tuple(message.digests)
        columns = zip(message.block_indices, message.block_ids, message.generations, strict=True)
        for column, (index, block_id, generation) in enumerate(columns):
            digest: Digest = digests[column * num_heads : (column + 1) * num_heads]
            pull.announced[group, index] = ExpectedBlock(block_id, generation, digest)
        if message.HasField("computed"):
            pull.first_token = Drawn(message.computed.first_token_id)
            if message.computed.HasField("first_logprobs"):
                told = logprobs_from_pb(message.computed.first_logprobs)
                pull.first_token = pull.first_token._replace(logprobs=told)
            pull.computed_at = time.monotonic()
        if pull.sequence.is_admitted:
            self._pull_announced(pull)
            self._release_when_complete(pull)
            if message.HasField("computed"):
                self._seal_landed(pull)

    def _pull_announced(self, pull: Pull) -> None:
        """Asks for what was announced and is missing; what is held here is never asked for."""
        for group in range(len(self._pools.groups)):
            wanted = [
                (place, block)
                for place, block in pull.announced.items()
                if place[0] == group and place in pull.missing
            ]
            if wanted:
                self._submit_job(pull, group, wanted)
        pull.announced.clear()

    def _submit_job(
        self, pull: Pull, group: int, wanted: list[tuple[Place, ExpectedBlock]]
    ) -> None:
        table = pull.sequence.block_tables[group]
        peer = self._descriptions[pull.source.incarnation]
        job = _Job(
            pull.sequence.key,
            group,
            [place for place, _ in wanted],
            [table[index] for (_, index), _ in wanted],
            [block for _, block in wanted],
            peer.groups[group].block_bytes,
        )
        job_id = next(self._job_ids)
        self._jobs[job_id] = job
        remote_block_ids = [block.remote_block_id for block in job.expected]
        copies = tuple(map(BlockCopy, remote_block_ids, job.local_block_ids))
        self._submit(PullJob(job_id, peer, group, copies, tuple(job.expected)))
        # Still before this thread gives any block to anybody.
        self._pools.of(group).quarantine(job.local_block_ids)

    def key_of(self, result: PullResult) -> AttemptKey:
        return self._jobs[result.job_id].key

    def on_pulled(self, result: PullResult) -> None:
        """A job has ended: tells the source when it was the last. `settle` must follow: nobody
        waits for what that does."""
        job = self._jobs[result.job_id]
        pull = self._pulls.get(job.key)
        if pull is None:
            # The claim was given up during the read: the blocks may have become another's.
            return
        if result.error is not None:
            log_event(
                logger,
                logging.ERROR,
                "pull failed",
                key=job.key,
                source=pull.source.worker_id,
                message=result.error,
            )
            raise SourceLost("the source's blocks could not be read")
        if result.mismatched:
            self._report_mismatch(pull, job, result.mismatched)
        pull.missing.difference_update(job.places)
        pull.num_pulled_blocks += len(job.places)
        self._counters["pulled_blocks"] += len(job.places)
        self._counters["pulled_bytes"] += len(job.places) * job.block_bytes
        if not self._pools.groups[job.group].spec.grows:
            self._counters["pulled_state_bytes"] += len(job.places) * job.block_bytes
        pull.num_pulled_bytes += len(job.places) * job.block_bytes
        self._release_when_complete(pull)

    def _report_mismatch(self, pull: Pull, job: _Job, mismatched: tuple[int, ...]) -> None:
        self._counters["digest_mismatches"] += len(mismatched)
        bad = [(job.places[column], job.expected[column]) for column in mismatched]
        for column in mismatched:
            group, index = job.places[column]
            log_event(
                logger,
                logging.ERROR,
                "digest mismatch",
                key=job.key,
                group=group,
                index=index,
                source=pull.source.worker_id,
                source_block=job.expected[column].remote_block_id,
                generation=job.expected[column].generation,
                copy_block=job.local_block_ids[column],
            )
        self.cancel(pull, mismatched=bad)
        raise DigestMismatch(f"{len(bad)} blocks differ from what was sealed")

    def settle(self, result: PullResult) -> None:
        """The job's blocks may be used, or be given to somebody else, only now."""
        job = self._jobs.pop(result.job_id)
        self._pools.of(job.group).lift_quarantine(job.local_block_ids)
        self._trace.emit(
            "pulled",
            key=job.key,
            places=job.places,
            started=result.started_s,
            finished=result.finished_s,
            mismatched=result.mismatched,
            error=result.error,
        )
        pull = self._pulls.get(job.key)
        if pull is not None and result.error is None and not result.mismatched:
            self._seal(pull, job, result.local_sums)

    def _seal(self, pull: Pull, job: _Job, sums: Uint64Array) -> None:
        digests = self._sealer.digests_of_sums(job.group, job.local_block_ids, sums)
        pull.landed.update(zip(job.places, digests, strict=True))
        self._seal_landed(pull)

    def _seal_landed(self, pull: Pull) -> None:
        """The copies become this worker's own sealed blocks, each behind all before it in every
        group; tail and states stay open for decode.

        Not before the prompt is computed: until then its owner has not checked the blocks that
        these were computed from, and if one is corrupt nobody may find them here.
        """
        if pull.first_token is None:
            return
        sequence = pull.sequence
        num_full = len(sequence.block_hashes)
        grows = [group.spec.grows for group in self._pools.groups]
        missing = [index for group, index in pull.missing if grows[group]]
        end = min([num_full, *missing])
        for group, index in sorted(pull.landed, key=lambda place: place[1]):
            if grows[group] and index < end:
                digest = pull.landed.pop((group, index))
                self._sealer.seal_block(sequence, group, index, digest)
        for table in sequence.block_tables:
            table.num_sealed = max(table.num_sealed, end)

    def _release_when_complete(self, pull: Pull) -> None:
        if pull.missing or pull.first_token is None or pull.is_released:
            return
        pull.is_released = True
        pull.transfer_s = time.monotonic() - pull.computed_at
        release = kv.ReleaseClaim(key=key_to_pb(pull.sequence.key))
        self._emit(ToSource(pull.source, kv.HoldRequest(release=release)))

    def cancel(self, pull: Pull, *, mismatched: Iterable[tuple[Place, ExpectedBlock]] = ()) -> None:
        """Gives the claim up. Blocks under a job in flight stay in quarantine until it ends."""
        if self._pulls.pop(pull.sequence.key, None) is None:
            return
        cancel = kv.CancelClaim(key=key_to_pb(pull.sequence.key))
        for (group, _), block in mismatched:
            cancel.mismatched_groups.append(group)
            cancel.mismatched_block_ids.append(block.remote_block_id)
            cancel.mismatched_generations.append(block.generation)
        self._emit(ToSource(pull.source, kv.HoldRequest(cancel=cancel)))
