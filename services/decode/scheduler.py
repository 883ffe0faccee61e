"""Which sequences of the running batch take a step, and who yields when blocks run out.

Pure policy. Blocks are never taken from an older sequence for a younger one: the latest is
preempted first, so the oldest always goes on and everything finishes in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

from baton.shared.kv.sequence import Sequence, SequenceState

Lacking = Callable[[Sequence], Seq[int]]
"""By pool: blocks that a sequence lacks for the tokens that it computes next."""


def running(hosted: Iterable[Sequence], *, masks_follow: bool = False) -> list[Sequence]:
    """Those of the sequences that decode here whose next token can be computed in the coming step.

    The last chunk of a prompt that stays here may be in flight: the token that it draws is on the
    device before the step that needs it begins. Where what may be drawn depends on it, the host has
    to know it first; of what is constrained before the draw only, if `masks_follow`.
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
        # What may follow depends on the token that is being drawn.
        and not (
            sequence.num_steps_in_flight
            and (sequence.needs_last_tokens or not masks_follow and sequence.matcher is not None)
        )
    ]


def lacking_room(running: Iterable[Sequence]) -> list[Sequence]:
    """Those that have no room, in some group, for the token that they compute next."""
    return [
        sequence
        for sequence in running
        if sequence.num_room_tokens <= sequence.num_scheduled_tokens
    ]


def is_short_of_blocks(
    lacking: Iterable[Sequence], num_lacking: Lacking, num_free_blocks: Seq[int]
) -> bool:
    """Whether some pool has too few blocks for all of them; `num_free_blocks` by pool."""
    wanted = [0] * len(num_free_blocks)
    for sequence in lacking:
        wanted = list(map(int.__add__, wanted, num_lacking(sequence)))
    return any(map(int.__gt__, wanted, num_free_blocks))


def choose_victim(holders: Seq[Sequence]) -> Sequence | None:
    """Who is preempted: the last of those that hold blocks, in order of arrival; never the first.

    Alone in the pools a sequence always fits: larger ones are refused when they are admitted.
    """
    return holders[-1] if len(holders) > 1 else None


def choose_rows(
    running: Iterable[Sequence],
    num_lacking: Lacking,
    *,
    num_free_blocks: Seq[int],
    max_rows: int,
) -> list[Sequence]:
    """Those that decode in this step, oldest first; `num_free_blocks` by pool.

    One that lacks a block which a transfer, or a step in flight, still keeps sits the step out.
    """
    rows: list[Sequence] = []
    free = list(num_free_blocks)
    for sequence in running:
        if len(rows) == max_rows:
            break
        left = list(map(int.__sub__, free, num_lacking(sequence)))
        if min(left) >= 0:
            free = left
            rows.append(sequence)
    return rows
