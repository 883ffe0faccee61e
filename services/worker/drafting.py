"""Guess and verify: the drafts that decode steps check, and what came of them.

    schedule   how many pay (draft_lengths) ─► who guesses (drafters) ─► which are taken ─► parts
    collect    those that were drawn stand ─► counts, chances

The draw of a position is a pure function of its logits, parameters, seed and place. So a draft
stands exactly while it is what would have been drawn without it, and the answer is the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as Seq
from itertools import takewhile
from typing import Protocol

from torch import Tensor

from baton.services.decode.draft_lengths import DraftLengths
from baton.services.decode.drafters import Draft, Drafter, NgramDrafter
from baton.services.decode.head_drafter import HeadDrafter
from baton.services.decode.model_drafter import ModelDrafter
from baton.services.worker.part import Part
from baton.shared.engine.draft_model import DraftModel
from baton.shared.kv.sequence import Sequence
from baton.shared.rpc.errors import EngineFailure
from baton.shared.speculation import Speculation
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)


class Lengths(Protocol):
    """What `DraftLengths` does."""

    def wanted(self, num_rows: int, sequences: Seq[Hashable]) -> list[int]: ...

    def choose(
        self, num_rows: int, offers: Seq[tuple[Hashable, int, int]], most: int
    ) -> list[int]: ...

    def checked(self, sequence: Hashable, num_checked: int, num_stood: int) -> None: ...

    def took_step(self, seconds: float, *, num_rows: int, num_guesses: int) -> None: ...

    def expects(self, num_rows: int) -> bool: ...

    def pays(self, num_rows: int, sequences: Iterable[Hashable]) -> bool: ...

    def spent(self, seconds: float) -> None: ...

    def forget(self, sequence: Hashable) -> None: ...


class Drafting:
    """
    Attributes:
        accepted_by_position: by place in its chain, tokens that stood, from the worker's start.
        num_given_up: sequences for which nobody guesses any more, as a step of who guesses failed.
    """

    def __init__(self, drafter: Drafter, lengths: Lengths, num_drafts: int) -> None:
        """`num_drafts`: the most that the engine checks of a sequence in a step."""
        self._drafter = drafter
        self._lengths = lengths
        self._num_drafts = num_drafts
        self.accepted_by_position = [0] * num_drafts
        self.num_given_up = 0
        self._given_up: set[Sequence] = set()
        self._head = drafter if isinstance(drafter, HeadDrafter) else None
        self._missed: dict[Sequence, None] = {}
        """Those for which guesses were wanted while the drafter was behind."""
        self._has_caught_up = False
        """Before the step that is being planned."""

    @classmethod
    def of(cls, speculation: Speculation, model: DraftModel | None = None) -> Drafting:
        """`model`: of the kinds that have one."""
        drafter: Drafter = NgramDrafter()
        if model is not None:
            drafter = ModelDrafter(model) if model.tapped is None else HeadDrafter(model)
        num_drafts = speculation.num_drafts
        return cls(drafter, DraftLengths(num_drafts), num_drafts)

    @property
    def reads_states(self) -> bool:
        """Whether the drafter wants to see what the model makes of tokens."""
        return self._head is not None

    def saw(self, part: Part, num_tokens: int, states: Tensor | None) -> None:
        """What the model made of a part's tokens, [part.num_tokens, taps · hidden]: of the first
        ones, which are in the answer or the prompt. None: it is not told.

        What the steps before drew is in the answer by now, and what this one drew is not.
        """
        sequence = part.sequence
        if self._head is None or states is None or not num_tokens:
            return
        if sequence.is_admitted and self._may_guess(sequence):
            # Not where it was planned: guesses that fell since then put it further back.
            start = sequence.num_computed_tokens
            try:
                self._head.saw(sequence, start, states[:num_tokens])
            except EngineFailure:
                self._give_up([sequence])

    def must_know_all(self, decoding: Seq[Sequence]) -> bool:
        """Whether guesses are worth more than a step that is launched ahead."""
        if not self._drafter.needs_known:
            return False
        asking = (each for each in decoding if self._may_guess(each))
        return self._lengths.pays(len(decoding), asking)

    def is_behind(self, sequences: Iterable[Sequence]) -> bool:
        """Whether there is anything to catch up with for any of them."""
        return any(
            self._may_guess(sequence) and self._drafter.is_behind(sequence)
            for sequence in sequences
        )

    def catch_up(self, sequences: Iterable[Sequence], num_decoding: int) -> bool:
        """Lets the drafter see what it has not seen of them, some of it: of all where guesses are
        expected to pay, else of those for which some were wanted. Whether there was any.

        `num_decoding`: sequences whose next tokens wait meanwhile.
        """
        self._has_caught_up = False
        pays = self._lengths.expects(num_decoding)
        behind = [
            sequence
            for sequence in sequences
            if self._may_guess(sequence)
            and (pays or sequence in self._missed)
            and self._drafter.is_behind(sequence)
        ]
        if not behind:
            return False
        started_s = time.monotonic()
        try:
            self._has_caught_up = self._drafter.catch_up(behind, others_wait=num_decoding > 0)
        except EngineFailure:
            self._give_up(behind)
        if not pays:
            self._lengths.spent(time.monotonic() - started_s)
        for sequence in behind:
            if not self._drafter.is_behind(sequence):
                self._missed.pop(sequence, None)
        return self._has_caught_up

    def add(
        self,
        parts: list[Part],
        extend: Callable[[Sequence, int], bool],
        num_more: int,
        num_allowed: Callable[[Sequence, Seq[int]], int],
        edge: int | None = None,
    ) -> None:
        """Gives decode parts drafts, `num_more` at most in all.

        `extend` finds room for so many tokens of a sequence; without it a part gets none.
        `num_allowed` says how many of a sequence's guesses its constraint lets be drawn. No part
        goes beyond the next multiple of `edge`.
        """
        asking = [part for part in parts if self._may_guess(part.sequence) and not part.draft_ids]
        if not asking or num_more < 1:
            return
        wanted = self._wanted(len(parts), asking, edge)
        if self._drafter.needs_known:
            # Guesses that nobody checks would cost as much.
            wanted = self._choose(len(parts), wanted, num_more)
        drafts = self._drafts(wanted, num_allowed)
        offers = [(part, len(draft.token_ids) - _num_supposed(part)) for part, draft in drafts]
        if not self._drafter.needs_known:
            offers = self._choose(len(parts), offers, num_more)
        for (part, draft), (_, length) in zip(drafts, offers, strict=True):
            if length and extend(part.sequence, part.end + length):
                first = _num_supposed(part)
                part.supposed_ids = draft.token_ids[:first]
                part.draft_ids = draft.token_ids[first : first + length]
                part.num_known = part.sequence.num_tokens
                part.is_predicted = draft.is_predicted
                part.num_tokens += length

    def _wanted(self, num_rows: int, asking: Seq[Part], edge: int | None) -> list[tuple[Part, int]]:
        """Whose drafts may pay, and how many at most."""
        limits = self._lengths.wanted(num_rows, [part.sequence for part in asking])
        wanted = []
        for part, limit in zip(asking, limits, strict=True):
            # What is drawn last is not computed.
            length = min(limit, self._num_drafts, part.sequence.num_to_compute - part.end)
            if edge is not None:
                length = min(length, -part.end % edge)
            if length > 0:
                wanted.append((part, length))
        return wanted

    def _choose(
        self, num_rows: int, offers: Seq[tuple[Part, int]], num_more: int
    ) -> list[tuple[Part, int]]:
        """How many of so many drafts are checked."""
        if not offers:
            return []
        asked = [(part.sequence, length, _num_supposed(part)) for part, length in offers]
        chosen = self._lengths.choose(num_rows, asked, num_more)
        return [(part, length) for (part, _), length in zip(offers, chosen, strict=True)]

    def _drafts(
        self,
        wanted: Seq[tuple[Part, int]],
        num_allowed: Callable[[Sequence, Seq[int]], int],
    ) -> list[tuple[Part, Draft]]:
        """As far as they may be drawn, what is supposed first; those without any are left out."""
        wanted = [(part, length) for part, length in wanted if length]
        if not wanted:
            return []
        try:
            drafts = self._drafter.drafts(
                [(part.sequence, _num_supposed(part) + length) for part, length in wanted]
            )
        except EngineFailure:
            self._give_up([part.sequence for part, _ in wanted])
            return []
        self._missed = {
            part.sequence: None for part, _ in wanted if self._drafter.is_behind(part.sequence)
        }
        made = [
            (part, draft._replace(token_ids=draft.token_ids[:most]))
            for (part, _), draft in zip(wanted, drafts, strict=True)
            for most in [num_allowed(part.sequence, draft.token_ids)]
        ]
        return [(part, draft) for part, draft in made if len(draft.token_ids) > _num_supposed(part)]

    def _may_guess(self, sequence: Sequence) -> bool:
        return sequence.params.speculate and sequence not in self._given_up

    def _give_up(self, sequences: Seq[Sequence]) -> None:
        """A step of who guesses failed, in an `except` block. Their answers go on without."""
        log_event(
            logger,
            logging.ERROR,
            "guessing failed: these sequences go on without",
            exc_info=True,
            num_sequences=len(sequences),
        )
        self.num_given_up += len(sequences)
        for sequence in sequences:
            self._drafter.forget(sequence)
            self._missed.pop(sequence, None)
        self._given_up.update(sequences)

    def took(self, part: Part, num_stood: int) -> None:
        """How many of a part's drafts stood. What the steps before drew is known by now."""
        sequence = part.sequence
        if not sequence.is_admitted or part.is_void:
            # Nobody gets what the step drew: the sequence has ended, or had no mask in time.
            return
        for place in range(num_stood):
            self.accepted_by_position[place] += 1
        drawn = sequence.token_slice(part.num_known, sequence.num_tokens)
        self._learn(part, drawn, num_stood)

    def _learn(self, part: Part, drawn: Seq[int], num_stood: int) -> None:
        """`drawn`: by the steps that were in flight when the drafts were made. What was supposed of
        them was guessed as well."""
        pairs = zip(drawn, part.supposed_ids, strict=False)
        num_right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        num_checked = min(num_right + 1, len(drawn))
        if num_right == len(part.supposed_ids):
            num_right, num_checked = num_right + num_stood, num_right + len(part.draft_ids)
        # Drafts behind a wrong supposition say nothing of the drafter.
        self._lengths.checked(part.sequence, num_checked, num_right)

    def took_step(self, seconds: float, parts: Seq[Part]) -> None:
        """Of a step without chunks of prompts, planning included."""
        if self._has_caught_up:
            return
        num_guesses = sum(len(part.draft_ids) for part in parts)
        self._lengths.took_step(seconds, num_rows=len(parts), num_guesses=num_guesses)

    def forget(self, sequence: Sequence) -> None:
        self._drafter.forget(sequence)
        self._missed.pop(sequence, None)
        self._given_up.discard(sequence)
        self._lengths.forget(sequence)


def _num_supposed(part: Part) -> int:
    """Tokens before the part's drafts that steps in flight draw."""
    return part.end - part.sequence.num_tokens
