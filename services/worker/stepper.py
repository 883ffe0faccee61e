"""One engine step: which sequences take part, their blocks, and the model's forward pass.

A step is launched, and its result is collected later: on a GPU the next one is launched before, so
that the device never waits for the host. What a sequence draws in a step in flight is on the
device already; the host plans with `num_scheduled_tokens` and learns the token afterwards.

    launch N + 1, up to its logits ─► collect N ─► masks by N's tokens ─► draw of N + 1

Where masks depend on tokens that are being drawn, the step is begun first and draws later.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from baton.services.decode import scheduler as decode_policy
from baton.services.prefill import scheduler as prefill_policy
from baton.services.prefill.pacing import Pacing
from baton.services.prefill.token_budget import TokenBudget
from baton.services.worker.constraining import Constraining
from baton.services.worker.drafting import Drafting
from baton.services.worker.failpoints import Failpoints
from baton.services.worker.part import Part
from baton.services.worker.sealing import PendingSums
from baton.services.worker.sequence_table import SequenceTable
from baton.shared.engine.batch import Batch, BatchRow, RowHandle
from baton.shared.engine.executor import BegunStep, Step
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.block_pool import PoolExhausted
from baton.shared.kv.drawn import BAD_LOGITS, NO_TOKEN, Drawn
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import BlockTable, Sequence, SequenceState
from baton.shared.rpc.errors import BatonError, EngineFailure, InvalidField, Preempted
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """`token_budget` tokens and `max_num_seqs` rows per step, prompt chunks and decode rows; up to
    `backlog_budget` tokens where prompts alone have queued up (services/prefill/token_budget.py).

    `tpot_goal_s`: prompts wait while streams get their tokens more slowly than that, on average.
    """

    token_budget: int
    max_num_seqs: int
    tpot_goal_s: float | None = None
    backlog_budget: int | None = None


@dataclass(slots=True)
class InFlight:
    """A step whose result was not taken yet."""

    parts: list[Part]
    step: Step | None
    """None: it has not drawn yet (`begun`), or failed: its parts are tried one by one."""
    started_s: float
    planned_s: float
    """When its planning began."""
    decoding: list[Part] = field(default_factory=list)
    """Those of the parts that decode; the others are chunks of prompts."""
    chunks: list[Part] = field(default_factory=list)
    begun: BegunStep | None = None
    """Until it draws, where parts await masks."""
    has_void: bool = False
    """Some parts are (`Part.is_void`)."""
    sums: PendingSums | None = None
    """Of the blocks that the chunks fill, and of those that must be checked behind them."""
    kept_sums: PendingSums | None = None
    """Of the slots that take the parts' states."""
    orphans: list[list[BlockTable]] = field(default_factory=list)
    """Block tables of sequences that ended meanwhile: the step may still write to them."""

    @property
    def has_failed(self) -> bool:
        return self.step is None and self.begun is None


Outcome = Seq[Drawn] | BatonError
"""What a part drew, or why nothing can be had of it."""


class Stepper:
    def __init__(
        self,
        runner: ModelRunner,
        pools: Pools,
        table: SequenceTable,
        limits: BatchLimits,
        failpoints: Failpoints,
        drafting: Drafting | None = None,
        constraining: Constraining | None = None,
    ) -> None:
        self._runner = runner
        self._pools = pools
        self._table = table
        self._limits = limits
        self._failpoints = failpoints
        self._drafting = drafting
        self._constraining = constraining or Constraining(0)
        self.pacing = Pacing(limits.tpot_goal_s)
        self._token_budget = TokenBudget(limits.token_budget, limits.backlog_budget)
        self._handles: dict[Sequence, RowHandle] = {}
        self._keeps_states = not all(group.spec.grows for group in pools.groups)
        self._masks_follow = not (
            drafting is not None or self._constraining.most_forced or self._keeps_states
        )
        """Constrained sequences may be a step ahead: nothing is lost with what they could guess,
        and a step whose mask came too late can be taken again, which a state would not stand."""

    @property
    def accepted_by_position(self) -> Seq[int]:
        """By place in its chain, drafted tokens that stood; empty where nobody drafts."""
        return () if self._drafting is None else self._drafting.accepted_by_position

    @property
    def num_given_up(self) -> int:
        """See `Drafting`."""
        return 0 if self._drafting is None else self._drafting.num_given_up

    def must_know_all(self) -> bool:
        """Whether the next step has to wait for those in flight, so that guesses are good ones."""
        return self._drafting is not None and self._drafting.must_know_all(
            self._table.decode_hosted_in(SequenceState.DECODING)
        )

    def drafter_is_behind(self) -> bool:
        """Whether there is anything for it to do while blocks are on their way."""
        return self._drafting is not None and self._drafting.is_behind(
            self._table.decode_hosted_in(SequenceState.TRANSFERRING)
        )

    def let_drafter_catch_up(self) -> bool:
        """Whether it had anything to catch up with."""
        if self._drafting is None:
            return False
        decoding = self._table.decode_hosted_in(SequenceState.DECODING)
        coming = self._table.decode_hosted_in(SequenceState.TRANSFERRING)
        if self._drafting.reads_states:
            coming = self._table.decode_hosted_in(SequenceState.PREFILLING)
        return self._drafting.catch_up([*decoding, *coming], len(decoding))

    def schedule(
        self, preempt: Callable[[Sequence], None], blocks_are_coming: Callable[[], bool]
    ) -> list[Part]:
        """A token for each running sequence, then chunks of prompts, as far as the limits go.

        `preempt` ends a sequence for good and gives its blocks back, when no step that is in flight
        may write to them any more; `blocks_are_coming` says whether such are awaited.
        """
        decoding = self._schedule_decode(preempt, blocks_are_coming)
        prefilling = self._table.in_state(SequenceState.PREFILLING)
        if prefilling and not self.pacing.may_take_chunks(
            time.monotonic(), num_decoding=len(decoding)
        ):
            prefilling = []
        for sequence in prefilling:
            # Unless it had to yield to one before it.
            if sequence.is_admitted:
                self._extend_ahead(sequence, preempt, blocks_are_coming)
        parts = [
            Part(sequence, sequence.num_scheduled_tokens, 1)
            for sequence in decoding
            if sequence.is_admitted
        ]
        # Drafts last: nobody yields for what they take.
        num_more = self._limits.token_budget - len(parts)
        # Where a state is kept a part ends: in the middle of it there is none.
        edge = self._pools.block_size if self._runner.keeps_checkpoints else None
        self._constraining.add_forced(parts, self._has_room, num_more, edge)
        if self._drafting is not None:
            num_more -= sum(len(part.draft_ids) for part in parts)
            num_allowed = self._constraining.num_allowed
            self._drafting.add(parts, self._has_room, num_more, num_allowed, edge)
        # Without those that had to yield.
        chunks = self._choose_chunks([each for each in prefilling if each.is_admitted], parts)
        return self._constraining.add_masks(parts + chunks)

    def _has_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Takes it, for the worst case; nobody yields for it."""
        try:
            self._pools.extend(sequence, num_tokens)
        except PoolExhausted:
            return False
        return True

    def _choose_chunks(self, prefilling: list[Sequence], decoding: list[Part]) -> list[Part]:
        """What the step has room for beside those that decode."""
        if not prefilling:
            return []
        num_to_open = sum(part.sequence not in self._handles for part in decoding)
        num_decoding = sum(part.num_tokens for part in decoding)
        block_size = self._pools.block_size
        budget = self._token_budget.of_step(
            prefilling, num_decoding=num_decoding, block_size=block_size
        )
        chunks = prefill_policy.choose_chunks(
            prefilling,
            # However many decode, prompts go on by a block at least.
            token_budget=max(budget - num_decoding, block_size),
            max_rows=min(
                self._limits.max_num_seqs - len(decoding), self._runner.num_free_rows - num_to_open
            ),
            block_size=block_size,
        )
        return [
            Part(chunk.sequence, chunk.sequence.num_scheduled_tokens, chunk.num_tokens)
            for chunk in chunks
        ]

    def _extend_ahead(
        self,
        sequence: Sequence,
        preempt: Callable[[Sequence], None],
        blocks_are_coming: Callable[[], bool],
    ) -> None:
        """Room for the prompt's next tokens in groups that give blocks back behind a window.

        What it gave back is free again unless others hold it too; then the latest has to yield.
        """
        wanted = min(self._pools.num_ahead(sequence), sequence.num_prompt_tokens)
        while sequence.is_admitted and sequence.num_room_tokens < wanted:
            try:
                self._pools.extend(sequence, wanted)
            except PoolExhausted:
                has_room = sequence.num_room_tokens > sequence.num_scheduled_tokens
                if (
                    has_room
                    or sequence.num_steps_in_flight
                    or self._blocks_are_kept(blocks_are_coming)
                ):
                    return
                # A block is enough to go on.
                wanted = min(wanted, sequence.num_room_tokens + self._pools.block_size)
                if self._pools.has(self._pools.num_lacking(sequence, wanted)):
                    continue
                victim = decode_policy.choose_victim(self._table.admitted())
                if victim is None:
                    return
                preempt(victim)

    def _blocks_are_kept(self, blocks_are_coming: Callable[[], bool]) -> bool:
        """Whether a transfer, or a step in flight, will give blocks back by itself."""
        return self._pools.num_quarantined > 0 or blocks_are_coming()

    def _schedule_decode(
        self, preempt: Callable[[Sequence], None], blocks_are_coming: Callable[[], bool]
    ) -> list[Sequence]:
        """The running sequences of this step, each with room for its token."""
        max_rows = self._limits.max_num_seqs
        running = self._running()
        rows = running[:max_rows]
        lacking = decode_policy.lacking_room(running)
        while lacking and decode_policy.is_short_of_blocks(
            lacking, self._num_lacking, self._pools.num_free
        ):
            victim = None
            if not self._blocks_are_kept(blocks_are_coming):
                victim = decode_policy.choose_victim(self._table.growing())
            if victim is None:
                rows = decode_policy.choose_rows(
                    running,
                    self._num_lacking,
                    num_free_blocks=self._pools.num_free,
                    max_rows=max_rows,
                )
                break
            preempt(victim)
            running = self._running()
            rows = running[:max_rows]
            lacking = decode_policy.lacking_room(running)
        for sequence in decode_policy.lacking_room(rows):
            self._pools.extend(sequence, sequence.num_scheduled_tokens + 1)
        return rows

    def _running(self) -> list[Sequence]:
        hosted = self._table.decode_hosted()
        return decode_policy.running(hosted, masks_follow=self._masks_follow)

    def _num_lacking(self, sequence: Sequence) -> list[int]:
        return self._pools.num_lacking(sequence, sequence.num_scheduled_tokens + 1)

    def launch(self, parts: list[Part], planned_s: float) -> InFlight:
        """Starts a step of all parts in one batch. `planned_s`: when its planning began."""
        self._failpoints.before_step()
        started_s = time.monotonic()
        step: Step | None = None
        begun: BegunStep | None = None
        try:
            batch = Batch(self._rows(parts))
            if any(part.awaits_mask for part in parts):
                begun = self._runner.begin(batch)
            else:
                step = self._runner.launch(batch)
        except Exception:
            self._step_failed(parts)
        for part in parts:
            part.sequence.num_scheduled_tokens += part.num_tokens
            part.sequence.num_steps_in_flight += 1
        by_kind: dict[bool, list[Part]] = {True: [], False: []}
        for part in parts:
            by_kind[part.is_chunk].append(part)
        return InFlight(parts, step, started_s, planned_s, by_kind[False], by_kind[True], begun)

    def draw(self, in_flight: InFlight) -> None:
        """The rest of a step that was begun: its masks, then what they are for.

        All steps before it have been collected. Nobody hears of what is drawn for sequences that
        have ended, or failed, since.
        """
        begun, in_flight.begun = in_flight.begun, None
        assert begun is not None
        self._add_awaited_masks(in_flight)
        masks = {
            row: part.masks for row, part in enumerate(in_flight.parts) if part.masks is not None
        }
        try:
            in_flight.step = begun.draw(masks)
        except Exception:
            self._step_failed(in_flight.parts)
            # Its rows are computed again, and by themselves: with other bits, it may be.
            in_flight.sums = None

    def _add_awaited_masks(self, in_flight: InFlight) -> None:
        for part in self._constraining.add_awaited_masks(in_flight.parts):
            in_flight.has_void = True
            part.sequence.num_scheduled_tokens -= part.num_tokens
            if part.sequence in self._handles:
                self._handles[part.sequence].take_back()

    def _step_failed(self, parts: Seq[Part]) -> None:
        log_event(
            logger,
            logging.ERROR,
            "step failed, trying its rows one by one",
            exc_info=True,
            num_rows=len(parts),
        )
        self._runner.check_device()

    def collect(self, in_flight: InFlight) -> Seq[Outcome]:
        """What each part drew, or why it could not.

        The steps before it have been collected. Parts of a step that failed are computed here, one
        by one, so that no sequence stops another. Only now it is known which drafts stand: what
        others launched for a sequence meanwhile is further back by those that do not.
        """
        for part in in_flight.parts:
            part.sequence.num_steps_in_flight -= 1
        if in_flight.step is None:
            self._add_awaited_masks(in_flight)
            outcomes = [self._alone(part) for part in in_flight.parts]
        else:
            outcomes = _outcomes(in_flight.parts, in_flight.step)
            if in_flight.has_void:
                outcomes = [
                    () if part.is_void else outcome
                    for part, outcome in zip(in_flight.parts, outcomes, strict=True)
                ]
            if self._constraining.has_failures:
                outcomes = [
                    self._constraining.failure(part.sequence) or outcome
                    for part, outcome in zip(in_flight.parts, outcomes, strict=True)
                ]
            if self._drafting is not None and self._drafting.reads_states:
                self._show_states(self._drafting, in_flight.parts, in_flight.step, outcomes)
        for part, outcome in zip(in_flight.parts, outcomes, strict=True):
            if part.draft_ids and not isinstance(outcome, BatonError):
                self._took_drafts(part, len(outcome))
        return outcomes

    def _show_states(
        self, drafting: Drafting, parts: Seq[Part], step: Step, outcomes: Seq[Outcome]
    ) -> None:
        for row, (part, outcome) in enumerate(zip(parts, outcomes, strict=True)):
            if self._table.recipient(part.sequence.key) is None or isinstance(outcome, BatonError):
                continue
            num_standing = part.num_tokens if part.is_chunk else len(outcome)
            drafting.saw(part, 0 if part.is_void else num_standing, step.taps(row))

    def _took_drafts(self, part: Part, num_drawn: int) -> None:
        sequence, num_fallen = part.sequence, part.num_tokens - num_drawn
        if self._drafting is not None and not part.is_forced:
            self._drafting.took(part, num_drawn - 1)
        sequence.num_scheduled_tokens -= num_fallen
        if num_fallen and sequence.is_admitted:
            # Steps in flight are further back as well: none writes to what was taken beyond.
            self._pools.give_back_ahead(sequence, sequence.num_scheduled_tokens)
            self._handles[sequence].gave_back(sequence.block_tables)

    def took_step(self, step: InFlight, seconds: float, num_drawn: int) -> None:
        """What it took from its planning on; its decode rows drew `num_drawn` tokens."""
        decoding = step.decoding
        # A stream's tokens come as often as steps, or more of them at once.
        per_token_s = seconds * len(decoding) / max(num_drawn, 1)
        self.pacing.took_step(per_token_s, num_decoding=len(decoding))
        is_decode_only = step.step is not None and bool(decoding) and not step.chunks
        if is_decode_only and self._drafting is not None:
            self._drafting.took_step(seconds, decoding)

    def forget(self, sequence: Sequence) -> None:
        """It takes part in no further step."""
        if self._drafting is not None:
            self._drafting.forget(sequence)
        self._constraining.forget(sequence)
        handle = self._handles.pop(sequence, None)
        if handle is not None:
            self._runner.close_row(handle)

    def _alone(self, part: Part) -> Outcome:
        """Computes a part of a step that failed again, by itself.

        The step may have begun, and keys and values that are written twice are the same. A state
        is not, once a token was applied to it: only a part that begins with none can be repeated.
        Others are computed to learn whose fault it was; who has none begins anew.
        """
        if not part.sequence.is_admitted or part.is_void:
            return ()
        failure = self._constraining.failure(part.sequence)
        if failure is not None:
            return failure
        try:
            [outcome] = _outcomes([part], self._runner.launch(Batch(self._rows([part]))))
        except Exception as error:
            log_event(
                logger, logging.ERROR, "row failed alone", key=part.sequence.key, exc_info=True
            )
            self._runner.check_device()
            return EngineFailure(f"the engine failed: {type(error).__name__}")
        if self._keeps_states and part.start:
            return Preempted("its state was lost with a step that failed")
        return outcome

    def _rows(self, parts: list[Part]) -> list[BatchRow]:
        handles = self._handles
        return [part.row(handles.get(part.sequence) or self._open(part.sequence)) for part in parts]

    def _open(self, sequence: Sequence) -> RowHandle:
        handle = self._runner.open_row(sequence.params, sequence.key.sample, sequence)
        self._handles[sequence] = handle
        return handle


def _outcomes(parts: Seq[Part], step: Step) -> list[Outcome]:
    """By part; what the step told of prompts is the part's from now on."""
    outcomes = [
        _outcome(part.sequence, drawn) for part, drawn in zip(parts, step.result(), strict=True)
    ]
    for row, part in enumerate(parts):
        if part.sequence.params.prompt_logprobs is not None and part.wanted_logprobs() is not None:
            told = step.prompt_logprobs(row)
            part.prompt_logprobs = [each for each in told if each is not None]
            if len(part.prompt_logprobs) < len(told):
                outcomes[row] = _outcome(part.sequence, [BAD_LOGITS])
    return outcomes


def _outcome(sequence: Sequence, drawn: Seq[Drawn]) -> Outcome:
    for index, each in enumerate(drawn):
        if each.failure is not None:
            if each.failure == NO_TOKEN.failure and sequence.rules_tokens_out:
                num_tokens = sequence.next_index + index
                problem = f"leaves no token to draw behind {num_tokens} tokens of the answer"
                return InvalidField(
                    "sampling", problem, limit="tokens that are allowed and not banned"
                )
            return EngineFailure(each.failure)
    return drawn
