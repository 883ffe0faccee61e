"""Rows that nobody asked for: what is measured, and compiled by, before a device serves."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from baton.shared.engine.batch import BatchRow
from baton.shared.kv.arrangement import Arrangement
from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class TrialRows:
    """They have the first blocks of each pool, and touch no slot."""

    arrangement: Arrangement
    block_size: int
    vocab_size: int

    def prompt(self, num_tokens: int) -> BatchRow:
        """Of random tokens: products of equal rows would be done faster, at less power."""
        draw = random.Random(num_tokens)
        token_ids = draw.choices(range(self.vocab_size), k=num_tokens)
        taken = [0] * self.arrangement.num_pools
        tables = []
        for group, pool in zip(self.arrangement.groups, self.arrangement.pools, strict=True):
            if not group.spec.grows:
                tables.append([NO_BLOCK])
                continue
            count = group.num_blocks_for(num_tokens, self.block_size)
            tables.append(list(range(taken[pool], taken[pool] + count)))
            taken[pool] += count
        return BatchRow(token_ids, 0, tables, SamplingParams(temperature=0.0))

    def stretch(self, stretch: range) -> BatchRow:
        """Those tokens of a prompt; what lies before them in its blocks may be anything."""
        prompt = self.prompt(stretch.stop)
        assert prompt.token_ids is not None
        return replace(prompt, token_ids=prompt.token_ids[stretch.start :], position=stretch.start)

    def guess(self, num_tokens: int, num_drafts: int) -> BatchRow:
        """Of one token and guesses, with blocks for so many tokens."""
        return replace(self.prompt(num_tokens), token_ids=[0], draft_ids=[0] * num_drafts)
