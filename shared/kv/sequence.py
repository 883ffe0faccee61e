"""Sequence: what the engine knows of one attempt.

    computed here, decoded elsewhere    WAITING ─► PREFILLING ─► TRANSFERRING ─► FINISHED
    pulled from a prefill worker        WAITING ─► TRANSFERRING ─► DECODING ─► FINISHED
    computed and decoded here           WAITING ─► PREFILLING ─► DECODING ─► FINISHED
    any of them, in any state           ─► ABORTED

WAITING lasts until the pool has room for the whole prompt; a sequence that is to be pulled also
waits until its prefill worker has admitted it. PREFILLING lasts until the last chunk is computed,
TRANSFERRING while the decode worker pulls the blocks: for the prefill worker until they have been
released, for the decode worker until all have come and the other has answered that it held them
throughout. DECODING is being in the running batch. Where the first token is also the last, or where
nobody is to claim the blocks, a prefill worker's sequence is FINISHED with that token.

ABORTED is every other end: cancel, deadline, preemption, a claim that broke, a worker that drains,
a failure. The gateway decides whether a new attempt follows.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.kv.drawn import TokenLogprobs
from baton.shared.sampling import BANNING_BIAS, SamplingParams

if TYPE_CHECKING:
    from baton.shared.constraints.matcher import AnswerMatcher


@dataclass(frozen=True, slots=True, order=True)
class AttemptKey:
    """One try at one sample of a request; every message between processes carries it."""

    request_id: str
    sample: int
    attempt: int

    @property
    def sequence(self) -> tuple[str, int]:
        """What stays the same from attempt to attempt."""
        return (self.request_id, self.sample)

    def __str__(self) -> str:
        return f"{self.request_id}/{self.sample}#{self.attempt}"


class SequenceState(enum.Enum):
    WAITING = "WAITING"
    PREFILLING = "PREFILLING"
    TRANSFERRING = "TRANSFERRING"
    DECODING = "DECODING"
    FINISHED = "FINISHED"
    ABORTED = "ABORTED"


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"


Place = tuple[int, int]
"""(cache group, index in the block table)."""


class BlockTable(list[int]):
    """A sequence's blocks in one cache group: block ids by logical block. In a group of states, the
    one slot.

    Attributes:
        first_live: blocks before it are holes (NO_BLOCK): given back, or never taken.
        num_sealed: blocks at the front that are holes, or full, final and known by their hash.
            Those of a prompt have a digest; those that decode wrote get it when a peer claims them.
            A slot is never sealed: its table's count goes along with the other groups'.
        left: (id, generation) of blocks that were used and given back; of slots, those that the
            state was copied from.
    """

    __slots__ = ("first_live", "left", "num_sealed")

    def __init__(self, block_ids: Seq[int] = (), *, first_live: int = 0) -> None:
        """`first_live`: so many holes come before the blocks."""
        super().__init__([NO_BLOCK] * first_live)
        self.extend(block_ids)
        self.first_live = first_live
        self.num_sealed = first_live
        self.left: list[tuple[int, int]] = []

    def leave(self, block_ids: Seq[int], generations: Seq[int]) -> None:
        """The blocks from `first_live` on become holes."""
        end = self.first_live + len(block_ids)
        self[self.first_live : end] = [NO_BLOCK] * len(block_ids)
        self.left.extend(zip(block_ids, generations, strict=True))
        self.first_live = end


@dataclass(slots=True, eq=False)
class Sequence:
    """Engine state of one attempt; equal to itself only, and hashed as quickly.

    `prompt_token_ids` holds the prompt and whatever earlier attempts emitted; `first_index` says
    how many of those at its end were emitted, so that the first token drawn here has that index.
    """

    key: AttemptKey
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    first_index: int = 0
    salt: bytes = b""
    prediction_token_ids: tuple[int, ...] = ()
    """What the client expects the answer to be; says nothing of what it is."""
    banned_sequences: tuple[tuple[int, ...], ...] = ()
    """The last token of each is not drawn behind the others, where those were emitted."""
    constraint: bytes = b""
    """Which texts the answer may be: a `Constraint` message, serialised; empty: any."""
    matcher: AnswerMatcher | None = None
    """Of the constraint, once that is compiled."""
    distrust: bool = False
    deadline: float | None = None
    """Seconds on this process's monotonic clock."""

    state: SequenceState = SequenceState.WAITING
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hash by logical block, for full blocks; grows while decoding."""
    block_tables: list[BlockTable] = field(default_factory=list)
    """By cache group; empty before the sequence is admitted and after it has ended."""
    is_apart: bool = False
    """One of its blocks is not the one that others find; none computed behind it may be found."""
    is_admitted: bool = False
    """It has its room: block tables, and whatever else its groups keep for it."""
    num_room_tokens: int = 0
    """Tokens from its beginning for which every group has a block, or had one."""
    output_token_ids: list[int] = field(default_factory=list)
    first_logprobs: TokenLogprobs | None = None
    """Of the first of them, if they are wanted."""
    num_cached_tokens: int = 0
    num_stored_tokens: int = 0
    """Their keys and values were cached; of those behind `num_cached_tokens` states are computed
    anew."""
    stops: tuple[int, ...] = ()
    """Positions of the prompt at which its state is to be kept, in order."""
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0
    """Computed, or being computed by a step in flight."""
    num_steps_in_flight: int = 0
    finish_reason: FinishReason | None = None
    """Why the token that was taken last is the last one."""
    num_to_compute: int = field(init=False)
    """Tokens that are ever computed; the last one drawn is not: nothing follows from it."""

    needs_last_tokens: bool = field(init=False)
    """Whether a token may be drawn depends on those just before it: the host has to know them when
    it launches a step."""

    def __post_init__(self) -> None:
        self.needs_last_tokens = any(len(token_ids) > 1 for token_ids in self.banned_sequences)
        num_to_draw = self.params.max_tokens - self.first_index
        self.num_to_compute = len(self.prompt_token_ids) + num_to_draw - 1

    @property
    def num_sealed_blocks(self) -> int:
        """Blocks at the front that are sealed in every group."""
        return min((table.num_sealed for table in self.block_tables), default=0)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_asked_tokens(self) -> int:
        """Of the client's prompt; what comes behind them was generated."""
        return len(self.prompt_token_ids) - self.first_index

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Then all of the client's prompt is computed by who computes it, and found in no cache."""
        return self.params.prompt_logprobs is not None and self.num_asked_tokens > 1

    @property
    def client_prompt_token_ids(self) -> tuple[int, ...]:
        """What the client asked: the prompt without what earlier attempts emitted."""
        return self.prompt_token_ids[: self.num_asked_tokens]

    @property
    def emitted_token_ids(self) -> tuple[int, ...]:
        """Every token generated for the request: by earlier attempts, then by this one. With
        `client_prompt_token_ids` before them they are the same whatever was tried meanwhile."""
        return (*self.prompt_token_ids[self.num_asked_tokens :], *self.output_token_ids)

    @property
    def rules_tokens_out(self) -> bool:
        """Whether the request itself may leave no token to draw."""
        params = self.params
        return bool(
            params.allowed_token_ids
            or any(bias == BANNING_BIAS for _, bias in params.logit_bias)
            or params.min_tokens
            or self.banned_sequences
        )

    @property
    def draws_on(self) -> bool:
        """Whether another token will be drawn after those that are drawn or being drawn now."""
        return self.num_scheduled_tokens < self.num_to_compute

    @property
    def next_index(self) -> int:
        """Index, within the request's generated tokens, of the next token to be drawn."""
        return self.first_index + len(self.output_token_ids)

    def token_slice(self, start: int, end: int) -> tuple[int, ...]:
        """Token ids at positions start … end − 1, prompt and output taken as one list."""
        num_prompt = len(self.prompt_token_ids)
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        output = self.output_token_ids[max(0, start - num_prompt) : end - num_prompt]
        return self.prompt_token_ids[start:num_prompt] + tuple(output)

    def append(self, token_id: int, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Takes a drawn token; says whether it is the last one."""
        params = self.params
        self.output_token_ids.append(token_id)
        if token_id in params.stop_token_ids or (
            token_id in eos_token_ids and not params.ignore_eos
        ):
            self.finish_reason = FinishReason.STOP
        elif self.first_index + len(self.output_token_ids) >= params.max_tokens:
            self.finish_reason = FinishReason.LENGTH
        return self.finish_reason
