"""Which sequences of the running batch take a step, and who yields when blocks run out.

Pure policy. Blocks are never taken from an older sequence for a younger one: the latest is
preempted first, so the oldest always goes on and everything finishes in the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from baton.shared.kv.sequence import Sequence, SequenceState


def running(hosted: Iterable[Sequence]) -> list[Sequence]:
    """Those of the sequences that decode here whose next token can be computed in the coming step.

    The last chunk of a prompt that stays here may be in flight: the token that it draws is on the
    device before the step that needs it begins.
    """
    decoding, prefilling = SequenceState.DECODING, SequenceState.PREFILLING
    return [
        sequence
        for sequence in hosted
        # Written out, as `draws_on`: this is asked of every sequence before every step.
        if sequence.num_scheduled_tokens < sequence.num_to_compute
        and (
            sequence.state is decoding
            or sequence.state is prefilling
            and sequence.num_scheduled_tokens >= len(sequence.prompt_token_ids)
        )
    ]


def lacking_blocks(running: Iterable[Sequence], block_size: int) -> list[Sequence]:
    """Those that have no slot for the token that they compute next; all groups' tables grow
    together."""
    return [
        sequence
        for sequence in running
        if len(sequence.block_tables[0]) * block_size <= sequence.num_scheduled_tokens
    ]


def num_blocks_wanted(sequence: Sequence, block_size: int) -> int:
    """Blocks that a sequence lacks for the token that it computes next, over all groups."""
    have = sequence.num_scheduled_tokens // block_size + 1
    wanted = 0
    for table in sequence.block_tables:
        wanted += have - len(table)
    return max(0, wanted)


def is_short_of_blocks(running: Iterable[Sequence], num_free_blocks: int, block_size: int) -> bool:
    lacking = lacking_blocks(running, block_size)
    return sum(num_blocks_wanted(sequence, block_size) for sequence in lacking) > num_free_blocks


def choose_victim(holders: Seq[Sequence]) -> Sequence | None:
    """Who is preempted: the last of those that hold blocks, in order of arrival; never the first.

    Alone in the pool a sequence always fits: larger ones are refused when they are admitted.
    """
    return holders[-1] if len(holders) > 1 else None


def plan_rows(
    running: Iterable[Sequence], *, num_free_blocks: int, max_rows: int, block_size: int
) -> list[Sequence]:
    """Those that decode in this step, oldest first.

    One that lacks a block which a transfer, or a step in flight, still keeps sits the step out.
    """
    rows: list[Sequence] = []
    for sequence in running:
        if len(rows) == max_rows:
            break
        wanted = num_blocks_wanted(sequence, block_size)
        if wanted <= num_free_blocks:
            num_free_blocks -= wanted
            rows.append(sequence)
    return rows
