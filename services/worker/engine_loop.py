"""The engine thread: schedule → forward → publish, for whatever role the worker has.

    inbox ─► commands ─► admit ─► launch a step ─► retire the one before ─► reports, once per step
                │                    │                 │
                ├── claims           │                 ├── tokens, endings
                └── pulls            └── stepper.py    └── seal what became final (sealing.py)
                   (handoff.py)

On a GPU a step is launched while the one before runs (`ModelRunner.steps_ahead`); on a CPU it is
retired at once. Where its masks need what the one before draws, it begins, and draws when that has
retired. A sequence that ends while a step in flight has a row for it gives its blocks back
when that step has retired: until then the step may write to them.

It owns every sequence, the block pool and both sides of the hand-off, so nothing here needs a
lock. It never waits for RPC, Redis or a transfer; those come back as commands.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq

from prometheus_client import CollectorRegistry

from baton.services.prefill.scheduler import Admission
from baton.services.worker import messages as msg
from baton.services.worker.admission import Admitter
from baton.services.worker.checkpoints import Checkpoints
from baton.services.worker.constraining import Constraining
from baton.services.worker.corruption import CorruptionGuard
from baton.services.worker.drafting import Drafting
from baton.services.worker.failpoints import Failpoints
from baton.services.worker.handoff import CLAIM_WAITS_S, ClaimTable, Pull, PullTable
from baton.services.worker.inspection import snapshot
from baton.services.worker.metrics import EngineMetrics
from baton.services.worker.part import Part
from baton.services.worker.reports import Reports
from baton.services.worker.sealing import Sealer
from baton.services.worker.sequence_table import Recipient, SequenceTable
from baton.services.worker.stepper import BatchLimits, InFlight, Outcome, Stepper
from baton.shared.directory.ledger import Stage
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.drawn import Drawn
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import AttemptKey, Sequence, SequenceState
from baton.shared.rpc.convert import key_from_pb
from baton.shared.rpc.errors import (
    AttemptFailed,
    BatonError,
    Cancelled,
    ClaimBroken,
    DeadlineExceeded,
    DigestMismatch,
    Draining,
    EngineFailure,
    InvalidField,
    Preempted,
    SourceLost,
    StaleAttempt,
)
from baton.shared.telemetry import Counters, Trace
from baton.shared.transfer.puller import PullJob
from baton.v1 import kv_service_pb2 as kv

_IDLE_WAIT_S = 0.25
_OVERDUE_CHECK_S = 0.02
_LET_GO_S = 0.0002


class EngineLoop:
    def __init__(
        self,
        runner: ModelRunner,
        pools: Pools,
        sealer: Sealer,
        *,
        identity: msg.Peer,
        limits: BatchLimits,
        inbox: queue.SimpleQueue[msg.Command],
        submit_pull: Callable[[PullJob], None],
        deliver: Callable[[list[msg.Outgoing]], None],
        failpoints: Failpoints,
        counters: Counters,
        trace: Trace,
        metrics: EngineMetrics | None = None,
        drafting: Drafting | None = None,
        most_forced: int = 0,
    ) -> None:
        """`most_forced`: tokens that must follow, by a constraint, and are computed in one step."""
        self._pools = pools
        self._sealer = sealer
        self._counters = counters
        self._trace = trace
        self._metrics = metrics or EngineMetrics(CollectorRegistry())
        self._eos = frozenset(runner.model_config.eos_token_ids)

        self.inbox = inbox
        self.num_steps = 0
        self.is_busy = False
        self._table = SequenceTable()
        constraining = Constraining(most_forced, self._metrics.made_masks)
        self._stepper = Stepper(
            runner, pools, self._table, limits, failpoints, drafting, constraining
        )
        self._steps_ahead = runner.steps_ahead
        self._launches_at_once = runner.steps_ahead > 0 and drafting is None
        """Nothing is waited for between the planning of a step and its launch."""
        self._runner = runner
        self._in_flight: deque[InFlight] = deque()
        self._reports = Reports(identity, self._table, deliver)
        self._guard = CorruptionGuard(pools, sealer, self._table, self._fail, counters)
        self._admitter = Admitter(
            pools, sealer, self._table, self._guard.found, keeps_states=runner.keeps_checkpoints
        )
        self._checkpoints = Checkpoints(
            pools, sealer, runner.copy_slots, counters, is_on=runner.keeps_checkpoints
        )
        self._claims = ClaimTable(pools, sealer, self._reports.emit, trace)
        self._pulls = PullTable(pools, sealer, submit_pull, self._reports.emit, counters, trace)
        self._unclaimed: set[AttemptKey] = set()
        """Prefill-hosted sequences whose blocks nobody will claim."""
        self._computed_at: dict[AttemptKey, float] = {}
        """When the prompt of a prefill-hosted sequence was complete."""
        self._may_wait = True
        self._is_draining = False
        self._is_stopping = False
        self._is_stalled = False
        """The last iteration had nothing to compute, though sequences may be waiting for blocks."""
        self._next_overdue_check = 0.0
        self._collected_s = 0.0
        """When the result of the last step was there."""

    @property
    def num_sequences(self) -> int:
        return len(self._table)

    def answer_release(self, key: AttemptKey, reader: str) -> kv.HoldResponse:
        """From any thread."""
        return self._claims.answer_release(key, reader)

    def run(self) -> None:
        """Until Stop. Any exception that gets out of here must end the process."""
        while not self._is_stopping:
            self.run_once()

    def run_once(self, *, may_wait: bool = True) -> None:
        """One iteration; when there is nothing to compute it waits for a command, if it may."""
        self._may_wait = may_wait
        self._take_commands(may_wait=may_wait)
        self._end_overdue()
        self._admit()
        if not self._launches_at_once:
            # What others wait for must not wait for the step.
            self._publish()
        self._is_stalled = not self._step()
        self._publish()

    # Commands

    def _take_commands(self, *, may_wait: bool) -> None:
        """Takes all that is there; waits for the first when nothing can be computed without."""
        try:
            self.is_busy = self._can_step()
            if may_wait and (not self.is_busy or self._is_stalled):
                wait_s = _OVERDUE_CHECK_S if self._table or self._claims else _IDLE_WAIT_S
                self._handle(self.inbox.get(timeout=wait_s))
            while True:
                self._handle(self.inbox.get_nowait())
        except queue.Empty:
            return

    def _handle(self, command: msg.Command) -> None:
        match command:
            case msg.StartPrefill(sequence, unclaimed):
                if self._start(sequence, None) and unclaimed:
                    self._unclaimed.add(sequence.key)
            case msg.StartDecode(sequence, recipient, source):
                if self._start(sequence, recipient) and source is not None:
                    self._pulls.start(sequence, source)
            case msg.CancelAttempts(key):
                self._cancel_up_to(key)
            case msg.GatewayLost(gateway):
                for sequence in self._table.of_gateway(gateway):
                    self._drop(sequence)
            case msg.FromReader():
                self._on_reader(command)
            case msg.ReaderLost(reader):
                for key in self._claims.of_reader(reader):
                    self._claims.forget(key)
                    self._fail_key(key, ClaimBroken("the reader of its blocks is gone"))
            case msg.FromSource():
                self._on_source(command)
            case msg.SourceGone(source, error):
                self._pulls.forget_source(source)
                for pull in self._pulls.of_source(source):
                    self._fail(pull.sequence, SourceLost(error.message))
                self._reports.emit(msg.SourceForgotten(source))
            case msg.Pulled():
                self._on_pulled(command)
            case msg.Inspect(check_integrity, reply):
                orphans = [tables for step in self._in_flight for tables in step.orphans]
                kept = self._checkpoints.held([step.parts for step in self._in_flight])
                state = snapshot(
                    self._table, self._pools, self._counters, check_integrity, orphans, kept
                )
                state.num_claims = len(self._claims)
                state.num_accepted_by_position.extend(self._stepper.accepted_by_position)
                self._metrics.num_given_up = self._stepper.num_given_up
                counts = self._runner.num_prompt_steps
                state.counters.num_captured_prompt_steps = counts.captured
                state.counters.num_launched_prompt_steps = counts.launched
                reply(state)
            case msg.Drain():
                self._is_draining = True
            case msg.FailAll(error):
                for sequence in self._table.all():
                    self._fail(sequence, error)
            case msg.Stop():
                self._is_stopping = True

    def _start(self, sequence: Sequence, recipient: Recipient | None) -> bool:
        error = self._reason_to_refuse(sequence, recipient)
        if error is not None:
            self._reports.failed(sequence.key, recipient, error)
            return False
        self._cancel_up_to(sequence.key)
        self._table.add(sequence, recipient)
        self._sealer.hash_blocks(sequence)
        return True

    def _reason_to_refuse(
        self, sequence: Sequence, recipient: Recipient | None
    ) -> BatonError | None:
        if self._is_draining:
            return Draining("the worker is shutting down")
        if self._table.is_stale(sequence.key):
            return StaleAttempt("this attempt, its cancel, or a later one was seen before")
        num_tokens, capacity = sequence.num_prompt_tokens, self._pools.capacity
        if recipient is not None:
            num_tokens = sequence.num_to_compute
        if not capacity.holds(num_tokens):
            problem = f"needs {capacity.describe_need(num_tokens)}"
            return InvalidField("token_ids", problem, limit=capacity.describe(num_tokens))
        return None

    def _cancel_up_to(self, key: AttemptKey) -> None:
        sequence = self._table.attempt_up_to(key)
        if sequence is not None:
            self._drop(sequence)
        self._table.refuse_up_to(key)

    def _on_reader(self, command: msg.FromReader) -> None:
        message, reader = command.message, command.reader
        match message.WhichOneof("message"):
            case "claim":
                self._on_claim(key_from_pb(message.claim.key), reader)
            case "release":
                key = key_from_pb(message.release.key)
                sequence = self._table.get(key)
                if self._claims.release(key, reader) and sequence is not None:
                    self._end(sequence, SequenceState.FINISHED)
                    self._reports.emit(msg.LedgerHandedOver(key))
            case "cancel":
                key = key_from_pb(message.cancel.key)
                self._table.refuse_up_to(key)
                self._claims.forget(key)
                self._guard.check_reported(message.cancel)
                error: AttemptFailed = Cancelled("the reader gave its claim up")
                if message.cancel.mismatched_block_ids:
                    error = DigestMismatch("the reader got other bytes than were sealed")
                self._fail_key(key, error)

    def _on_claim(self, key: AttemptKey, reader: str) -> None:
        sequence = self._table.get(key)
        if sequence is None and self._table.is_stale(key):
            self._claims.refuse(key, reader, ClaimBroken("the sequence has ended"))
            return
        if self._table.recipient(key) is not None:
            self._claims.refuse(key, reader, ClaimBroken("the sequence is not to be handed over"))
            return
        self._claims.add(key, reader)
        if sequence is not None and sequence.is_admitted:
            self._claims.tell_admitted(key)
            self._claims.announce(sequence)

    def _on_source(self, command: msg.FromSource) -> None:
        try:
            pull = self._pulls.on_message(command.source, command.message)
        except AttemptFailed as error:
            self._fail_key(self._pulls.key_in(command.message), error)
            return
        if pull is not None:
            self._join(pull)

    def _on_pulled(self, command: msg.Pulled) -> None:
        key = self._pulls.key_of(command.result)
        try:
            self._pulls.on_pulled(command.result)
        except AttemptFailed as error:
            self._fail_key(key, error)
        # The way to the source and back is long: the release goes first.
        self._publish()
        if self._may_wait and not self.is_busy:
            self._let_go()
        self._pulls.settle(command.result)

    # Admission

    def _admit(self) -> None:
        """Prompts to compute here, and prompts to pull, oldest first."""
        for sequence in self._table.in_state(SequenceState.WAITING):
            pull = self._pulls.get(sequence.key)
            if pull is not None and not pull.is_admitted:
                continue
            verdict = self._admitter.try_admit(sequence, reads=pull is not None)
            if verdict is Admission.ADMIT:
                self._admitted(sequence, pull)
            elif verdict is Admission.WAIT_FOR_ROOM:
                break

    def _admitted(self, sequence: Sequence, pull: Pull | None) -> None:
        key = sequence.key
        self._trace.emit("admitted", key=key, num_cached_tokens=sequence.num_cached_tokens)
        if pull is not None:
            sequence.state = SequenceState.TRANSFERRING
            self._reports.takes_over(sequence, pull.source)
            self._pulls.took_room(pull, self._admitter.take_new_places(sequence))
            return
        sequence.state = SequenceState.PREFILLING
        self._checkpoints.restore(sequence, self._admitter.take_sources(sequence))
        sequence.num_computed_tokens = sequence.num_cached_tokens
        sequence.num_scheduled_tokens = sequence.num_cached_tokens
        self._counters["cached_prompt_tokens"] += sequence.num_cached_tokens
        self._metrics.num_queried_tokens += sequence.num_prompt_tokens
        self._reports.owns(sequence, Stage.PREFILLING)
        if self._table.recipient(key) is None:
            self._reports.prompt_admitted(sequence)
            self._claims.tell_admitted(key)
            self._claims.announce(sequence)

    # Step

    def _can_step(self) -> bool:
        computing = (SequenceState.PREFILLING, SequenceState.DECODING)
        return (
            bool(self._in_flight)
            or any(sequence.state in computing for sequence in self._table.all())
            # It may have no room, or no reason, to catch up: then there is nothing to do.
            or not self._is_stalled
            and self._stepper.drafter_is_behind()
        )

    def _step(self) -> bool:
        """Launches a step, retires those before it; whether there was anything to do."""
        has_retired = False
        if self._in_flight and self._stepper.must_know_all():
            has_retired = self._retire_all_but(0)
        has_caught_up = self._stepper.let_drafter_catch_up()
        if has_caught_up:
            # Nobody shall think that it stands still.
            self.num_steps += 1
        planned_s = time.monotonic()
        parts = self._stepper.schedule(self._preempt, self._blocks_are_coming)
        if not parts:
            self._publish()
            return self._retire_all_but(0) or has_retired or has_caught_up
        self._checkpoints.plan(parts)
        launched = self._stepper.launch(parts, planned_s)
        self._in_flight.append(launched)
        self._start_sums(launched)
        if (behind := launched.step or launched.begun) is not None:
            launched.kept_sums = self._checkpoints.keep(parts, behind)
        # A device has its step by now, which the streams' thread would have kept from it, and they
        # need not wait for its result.
        self._publish()
        if launched.sums is not None:
            self._sealer.note_sealed(launched.sums)
        # After a failure nothing is planned before everything is known again.
        self._retire_all_but(0 if launched.has_failed else self._steps_ahead)
        if launched.begun is not None:
            # What the step before drew is known now, and this one computes meanwhile.
            self._stepper.draw(launched)
            if launched.has_failed:
                self._retire_all_but(0)
        return True

    def _retire_all_but(self, num_kept: int) -> bool:
        """Whether there were any."""
        has_retired = len(self._in_flight) > num_kept
        while len(self._in_flight) > num_kept:
            self._retire(self._in_flight.popleft())
        return has_retired

    def _start_sums(self, launched: InFlight) -> None:
        """What checks and seals prompts' blocks is made behind the step, before it is missed."""
        behind = launched.step or launched.begun
        if behind is None or not launched.chunks:
            return
        wanted: list[list[int]] = [[] for _ in self._pools.groups]
        for part in launched.chunks:
            for group, block_ids in enumerate(wanted):
                block_ids += self._blocks_to_sum(part, group)
        if any(wanted):
            launched.sums = self._sealer.start_sums(wanted, behind)

    def _blocks_to_sum(self, part: Part, group: int) -> list[int]:
        """Those that a chunk fills, and those that are checked when it is computed: behind the last
        one all before it, else what falls out of the window."""
        if not self._pools.groups[group].spec.grows:
            return []
        sequence, block_size = part.sequence, self._pools.block_size
        table, end = sequence.block_tables[group], part.end // block_size
        if part.end >= sequence.num_prompt_tokens:
            return table[table.first_live : end]
        leaving = self._pools.behind_window(sequence, group, part.end)
        first_new = max(part.start, sequence.num_stored_tokens) // block_size
        return leaving + table[max(first_new, table.first_live + len(leaving)) : end]

    def _blocks_are_coming(self) -> bool:
        return any(step.orphans for step in self._in_flight)

    def _retire(self, step: InFlight) -> None:
        """Takes what a step drew: its tokens leave, then comes what nobody's token waits for."""
        outcomes = self._stepper.collect(step)
        before_s, self._collected_s = self._collected_s, time.monotonic()
        self.num_steps += 1
        self._counters["steps"] += 1
        self._trace.emit("step", started=step.started_s, num_rows=len(step.parts))
        taken = zip(step.parts, outcomes, strict=True)
        unsettled = [part for part, outcome in taken if self._took(part, outcome, step)]
        self._publish()
        if self._may_wait and any(_ends_prompt(part) for part in unsettled):
            self._let_go()
        self._measure(step, outcomes, before_s)
        for part in unsettled:
            self._settle(part, step)
        self._checkpoints.retired(step.parts)
        for tables in step.orphans:
            self._pools.release(tables)

    def _measure(self, step: InFlight, outcomes: Seq[Outcome], before_s: float) -> None:
        """`before_s`: when the result of the step before was there."""
        num_drawn = sum(
            len(outcome)
            for part, outcome in zip(step.parts, outcomes, strict=True)
            if not part.is_chunk and not isinstance(outcome, BatonError)
        )
        # A step that was launched ahead had to wait for the one before.
        self._metrics.took_step(
            self._collected_s - max(step.started_s, before_s),
            num_decoded_tokens=sum(part.num_tokens for part in step.decoding),
            num_prompt_tokens=sum(part.num_tokens for part in step.chunks),
        )
        seconds = self._collected_s - max(step.planned_s, before_s)
        self._stepper.took_step(step, seconds, num_drawn)

    def _took(self, part: Part, outcome: Outcome, step: InFlight) -> bool:
        """Reports what a part drew; whether it filled blocks, or ended its sequence, as well."""
        sequence = part.sequence
        is_decoding = sequence.state is SequenceState.DECODING
        if not is_decoding and sequence.state is not SequenceState.PREFILLING:
            return False
        if isinstance(outcome, BatonError):
            if isinstance(outcome, EngineFailure):
                # It may be what they hold that made it fail: nobody shall find them again.
                self._pools.drop(sequence)
            self._fail(sequence, outcome)
            return False
        if not is_decoding:
            return self._took_chunk(part, outcome, step)
        num_before = len(sequence.output_token_ids)
        num_blocks = sequence.num_computed_tokens // self._pools.block_size
        for drawn in outcome:
            if sequence.finish_reason is None:
                sequence.num_computed_tokens += 1
                self._took_token(sequence, drawn)
        if part.draft_ids and not part.is_forced:
            self._count_drafts(part, len(outcome) - 1, len(sequence.output_token_ids) - num_before)
        has_filled = sequence.num_computed_tokens // self._pools.block_size > num_blocks
        return has_filled or bool(outcome) and sequence.finish_reason is not None

    def _count_drafts(self, part: Part, num_accepted: int, num_taken: int) -> None:
        """`num_taken`: tokens of the step that are part of the answer, which may have ended."""
        num_drafted = len(part.draft_ids)
        self._counters["drafts"] += 1
        self._counters["drafted_tokens"] += num_drafted
        self._counters["accepted_tokens"] += num_accepted
        if part.is_predicted:
            num_used = min(num_accepted, num_taken)
            self._reports.checked_prediction(
                self._table.recipient_of(part.sequence), num_used, num_drafted - num_used
            )

    def _settle(self, part: Part, step: InFlight) -> None:
        """Seals what a part filled, gives back what fell out of the window, tells the reader, and
        ends the sequence if that was all."""
        sequence = part.sequence
        if sequence.state in (SequenceState.FINISHED, SequenceState.ABORTED):
            # Another part found a block of it corrupt.
            return
        if part.is_chunk:
            self._settle_chunk(part, step)
        else:
            self._sealer.seal_computed(sequence, with_digests=False)
            self._checkpoints.seal(part, step.kept_sums)
            self._pools.give_back_behind(sequence, sequence.num_computed_tokens)
        self._end_if_finished(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._counters["preemptions"] += 1
        self._fail(sequence, Preempted("no free block"))

    def _took_chunk(self, part: Part, drawn: Seq[Drawn], step: InFlight) -> bool:
        """Whether the sequence is still there: its blocks may be found corrupt."""
        sequence = part.sequence
        restored = self._checkpoints.restored(sequence)
        if restored is not None and self._guard.has_corrupt(*restored):
            return False
        if not drawn:
            if not self._guard.may_leave(sequence, part.end, step.sums):
                return False
            sequence.num_computed_tokens += part.num_tokens
            self._reports.keep_prompt_logprobs(sequence, part.start + 1, part.prompt_logprobs)
            return True
        # Of all blocks but those that this chunk filled: they have no digest yet.
        if self._guard.has_spoiled(sequence, step.sums):
            return False
        sequence.num_computed_tokens += part.num_tokens
        self._reports.keep_prompt_logprobs(sequence, part.start + 1, part.prompt_logprobs)
        recipient = self._table.recipient(sequence.key)
        self._reports.prompt_logprobs(sequence, recipient)
        if recipient is None:
            sequence.state = SequenceState.TRANSFERRING
            sequence.first_logprobs = drawn[0].logprobs
            finish_reason = sequence.append(drawn[0].token_id, self._eos)
            self._counters["generated_tokens"] += 1
            self._reports.first_token(sequence, drawn[0], finish_reason)
        else:
            sequence.state = SequenceState.DECODING
            self._reports.joined(sequence, recipient, None)
            self._reports.owns(sequence, Stage.DECODING)
            self._took_token(sequence, drawn[0])
        return True

    def _settle_chunk(self, part: Part, step: InFlight) -> None:
        sequence, num_sealed = part.sequence, part.sequence.num_sealed_blocks
        self._sealer.seal_computed(sequence, with_digests=True, sums=step.sums)
        self._checkpoints.seal(part, step.kept_sums)
        self._counters["computed_prompt_tokens"] += part.num_tokens
        self._counters["computed_blocks"] += sequence.num_sealed_blocks - num_sealed
        self._trace.emit(
            "chunk",
            key=sequence.key,
            started=step.started_s,
            num_tokens=part.num_tokens,
            is_last=bool(sequence.output_token_ids),
        )
        if sequence.state is SequenceState.PREFILLING:
            self._claims.announce(sequence)
        elif sequence.state is SequenceState.TRANSFERRING:
            self._hand_over(sequence)
        if sequence.is_admitted:
            self._pools.give_back_behind(sequence, sequence.num_computed_tokens)

    def _hand_over(self, sequence: Sequence) -> None:
        """Our part of a prefill-hosted sequence is over, but for the reader's pulls."""
        key = sequence.key
        if sequence.finish_reason is not None or key in self._unclaimed:
            self._claims.fail(key, Cancelled("the sequence ended with its first token"))
            self._end(sequence, SequenceState.FINISHED)
            self._reports.ended(key)
            return
        self._stepper.forget(sequence)
        self._computed_at[key] = time.monotonic()
        self._sealer.freeze(sequence)
        self._claims.announce(sequence)

    def _join(self, pull: Pull) -> None:
        """All blocks are here and verified: into the running batch, first token out."""
        sequence, recipient = pull.sequence, self._table.recipient(pull.sequence.key)
        if recipient is None or pull.first_token is None:
            raise RuntimeError(f"{sequence.key} joins without recipient or first token")
        sequence.state = SequenceState.DECODING
        sequence.num_computed_tokens = sequence.num_prompt_tokens
        sequence.num_scheduled_tokens = sequence.num_prompt_tokens
        self._trace.emit(
            "joined",
            key=sequence.key,
            num_pulled_blocks=pull.num_pulled_blocks,
            num_pulled_bytes=pull.num_pulled_bytes,
        )
        self._reports.joined(sequence, recipient, pull)
        self._metrics.joined(pull.transfer_s, pull.num_pulled_bytes)
        self._reports.owns(sequence, Stage.DECODING, peer=pull.source.worker_id)
        self._took_token(sequence, pull.first_token)
        self._end_if_finished(sequence)

    def _took_token(self, sequence: Sequence, drawn: Drawn) -> None:
        index = sequence.next_index
        finish_reason = sequence.append(drawn.token_id, self._eos)
        self._counters["generated_tokens"] += 1
        self._reports.token(self._table.recipient_of(sequence), index, drawn, finish_reason)

    def _end_if_finished(self, sequence: Sequence) -> None:
        """After its last token, once its blocks are sealed."""
        if sequence.state is SequenceState.DECODING and sequence.finish_reason is not None:
            self._end(sequence, SequenceState.FINISHED)
            self._reports.ended(sequence.key)

    # Endings

    def _end_overdue(self) -> None:
        now = time.monotonic()
        if now < self._next_overdue_check:
            return
        self._next_overdue_check = now + _OVERDUE_CHECK_S
        for sequence in self._table.all():
            if sequence.deadline is not None and now > sequence.deadline:
                self._fail(sequence, DeadlineExceeded("the request's deadline has passed"))
        for key, computed_at in list(self._computed_at.items()):
            if key not in self._claims and now - computed_at > CLAIM_WAITS_S:
                self._fail_key(key, ClaimBroken("nobody claimed the blocks"))
        for key in self._claims.older_than(now - CLAIM_WAITS_S):
            if key not in self._table:
                self._claims.fail(key, ClaimBroken("the sequence did not come"))

    def _fail_key(self, key: AttemptKey, error: BatonError) -> None:
        sequence = self._table.get(key)
        if sequence is not None:
            self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: BatonError) -> None:
        """Ends a sequence and tells its host, and whoever reads its blocks."""
        self._reports.failed(sequence.key, self._table.recipient(sequence.key), error)
        self._drop(sequence, error)

    def _drop(self, sequence: Sequence, error: BatonError | None = None) -> None:
        """Ends a sequence whose host knows already; tells those at the other end of its blocks.

        `error`: why; None: its host cancelled it.
        """
        key = sequence.key
        pull = self._pulls.get(key)
        if pull is not None:
            self._pulls.cancel(pull)
        self._claims.fail(key, error or Cancelled("the sequence was cancelled"))
        self._counters["aborted"] += 1
        self._end(sequence, SequenceState.ABORTED)
        self._reports.ended(key)

    def _end(self, sequence: Sequence, state: SequenceState) -> None:
        """Gives back all that a sequence holds; its blocks when no step writes to them any more."""
        key = sequence.key
        self._table.remove(key)
        self._stepper.forget(sequence)
        self._reports.forget(key)
        sequence.state = state
        if sequence.is_admitted:
            if sequence.num_steps_in_flight:
                self._in_flight[-1].orphans.append(sequence.block_tables)
            else:
                self._pools.release(sequence.block_tables)
        sequence.block_tables, sequence.is_admitted = [], False
        self._admitter.forget(sequence)
        self._checkpoints.forget(sequence)
        self._computed_at.pop(key, None)
        self._unclaimed.discard(key)

    # Telling

    def _let_go(self) -> None:
        """Of the interpreter, for which the streams' thread would wait until all was settled."""
        time.sleep(_LET_GO_S)

    def _publish(self) -> None:
        changes = self._pools.prefix_cache.take_changes()
        if changes.added or changes.removed:
            self._reports.emit(msg.CacheChanged(changes))
        self._reports.flush(self.num_steps)


def _ends_prompt(part: Part) -> bool:
    return part.is_chunk and part.end >= part.sequence.num_prompt_tokens
