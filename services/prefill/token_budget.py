"""How many tokens a step takes. Pure policy."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from baton.services.prefill.scheduler import kept_for_the_oldest, num_open
from baton.shared.kv.sequence import Sequence

_PARTS_OF_A_LONG_PROMPT = 4
"""A prompt by itself is computed in as many steps at least, but for those that are small anyway:
its blocks are handed over while the next ones are computed."""


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """Steps are short, for whoever comes next, and for streams that get a token each step; where
    prompts have queued up they are larger, which computes a little more in the same time."""

    usual: int
    most: int | None = None
    """Where there is a backlog and nothing decodes; None: never more than is usual."""

    def of_step(self, prefilling: Seq[Sequence], *, num_decoding: int, block_size: int) -> int:
        """Tokens of the coming step. `prefilling`: in order of arrival; those of which nothing
        can be computed now, for it is under way or has no room, have no part in it.

        More than is usual only if no prompt's first token gets later by it: as many usual steps'
        worth as come before the one in which the first of them is done. Until then nobody but that
        prompt and the oldest has a share, so these steps together are what they were.
        """
        prefilling = [sequence for sequence in prefilling if num_open(sequence) > 0]
        if self.most is None or num_decoding or not prefilling:
            return self.usual
        first = min(prefilling, key=_num_left)
        of_others = 0
        if first is not prefilling[0]:
            of_others = kept_for_the_oldest(self.usual, prefilling[0], block_size)
        num_steps = -(-_num_left(first) // max(self.usual - of_others, 1)) - 1
        most = self.most
        if len(prefilling) == 1:
            most = min(most, first.num_prompt_tokens // _PARTS_OF_A_LONG_PROMPT)
        return max(self.usual, min(num_steps * self.usual, most))


def _num_left(sequence: Sequence) -> int:
    return sequence.num_prompt_tokens - sequence.num_scheduled_tokens
