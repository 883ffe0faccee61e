"""Part: what a step computes of one sequence."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from baton.shared.engine.batch import BatchRow, RowHandle, WantedLogprobs
from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.kv.drawn import TokenLogprobs
from baton.shared.kv.sequence import Sequence
from baton.shared.token_masks import TokenMasks


@dataclass(frozen=True, slots=True)
class KeptState:
    """A state that is kept for later prompts."""

    position: int
    """How many tokens of the sequence it is behind."""
    slots: Mapping[int, int]
    """By cache group of states: the slot that takes it."""


@dataclass(slots=True)
class Part:
    """A sequence's part of a step: `num_tokens` tokens from position `start` on."""

    sequence: Sequence
    start: int
    num_tokens: int
    draft_ids: Seq[int] = ()
    """The last of these tokens, which are guesses."""
    supposed_ids: Seq[int] = ()
    """Guesses of what steps in flight draw, without which the drafts say nothing."""
    num_known: int = 0
    """Tokens of the sequence that were known when the drafts were made."""
    is_forced: bool = False
    """The drafts are tokens that must follow: a constraint allows no others."""
    is_predicted: bool = False
    """The drafts are the client's own."""
    masks: TokenMasks | None = None
    """Of each draw, where the sequence is constrained."""
    awaits_mask: bool = False
    """It depends on a token that is being drawn, and is made while the step computes."""
    is_void: bool = False
    """There was no time for its mask: what it draws does not count, and is drawn again."""
    prompt_logprobs: Seq[TokenLogprobs] = ()
    """What the step told of the prompt's tokens, if they are wanted."""
    kept: tuple[KeptState, ...] = ()
    """States behind tokens of it that are kept; in order."""

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_chunk(self) -> bool:
        """Of a prompt; else one token of a sequence that decodes, and drafts behind it."""
        return self.start < self.sequence.num_prompt_tokens

    @property
    def draws(self) -> bool:
        """It reaches the end of what is known of the sequence."""
        return self.end - len(self.draft_ids) >= self.sequence.num_tokens

    @property
    def follows_unknown(self) -> bool:
        """Its token is drawn by a step in flight."""
        return self.end - len(self.draft_ids) > self.sequence.num_tokens

    def drop_drafts(self) -> None:
        self.num_tokens -= len(self.draft_ids)
        self.draft_ids, self.supposed_ids = (), ()
        self.is_forced = self.is_predicted = False

    def row(self, handle: RowHandle) -> BatchRow:
        sequence, start = self.sequence, self.start
        end, num_known = self.end - len(self.draft_ids), sequence.num_tokens
        return BatchRow(
            sequence.token_slice(start, end) if end <= num_known else None,
            start,
            sequence.block_tables,
            # As `draws` says.
            sequence.params if end >= num_known else None,
            sequence.key.sample,
            handle,
            self.draft_ids,
            masks=self.masks,
            prompt_logprobs=None
            if sequence.params.prompt_logprobs is None
            else self.wanted_logprobs(),
            num_stored=sequence.num_stored_tokens,
            keeps=self._keeps() if self.kept else (),
        )

    def _keeps(self) -> list[tuple[int, Seq[int]]]:
        """Those in the middle, which the step itself puts into their slots."""
        groups = range(len(self.sequence.block_tables))
        return [
            (each.position - self.start, [each.slots.get(group, NO_BLOCK) for group in groups])
            for each in self.kept
            if each.position < self.end
        ]

    def wanted_logprobs(self) -> WantedLogprobs | None:
        """Of the client's prompt, what follows the part's tokens."""
        sequence, start = self.sequence, self.start
        num_top = sequence.params.prompt_logprobs
        if num_top is None or start + 1 >= sequence.num_asked_tokens:
            return None
        end = min(self.end + 1, sequence.num_asked_tokens)
        return WantedLogprobs(0, sequence.prompt_token_ids[start + 1 : end], num_top)
