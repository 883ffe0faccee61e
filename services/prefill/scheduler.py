"""Which prompts enter the pool, and which of their tokens a step computes. Pure policy."""

from __future__ import annotations

import enum
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from baton.shared.kv.sequence import Sequence

_SHARE_OF_THE_OLDEST = 8
"""One part in so many of a step's tokens. With less the long prompt waits longer for its own first
token, with more the short ones do: see tests/unit/worker/test_prompt_order.py."""


class Admission(enum.Enum):
    ADMIT = enum.auto()
    WAIT_FOR_PREFIX = enum.auto()
    """Another sequence is computing or pulling the next block: to be had for nothing soon."""
    WAIT_FOR_ROOM = enum.auto()
    """The pool has no room for the whole prompt; those behind wait too, so nobody starves."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` tokens of a sequence's prompt."""

    sequence: Sequence
    num_tokens: int


def admission(
    *,
    num_new_blocks: Seq[int],
    num_free_blocks: Seq[int],
    num_growing: Seq[int],
    prefix_is_coming: bool,
) -> Admission:
    """Whether a prompt may take its blocks now; all numbers are by pool.

    Sequences here will need `num_growing` blocks as they grow; leaving them that much keeps a new
    prompt from getting an older one preempted at once.
    """
    if prefix_is_coming:
        return Admission.WAIT_FOR_PREFIX
    pools = zip(num_free_blocks, num_new_blocks, num_growing, strict=True)
    if any(free - new < growing for free, new, growing in pools):
        return Admission.WAIT_FOR_ROOM
    return Admission.ADMIT


def choose_chunks(
    prefilling: Seq[Sequence], *, token_budget: int, max_rows: int, block_size: int
) -> list[Chunk]:
    """Shortest remaining first, until the step's token budget is spent; an eighth of it is the
    oldest's.

    So a short prompt's first token hardly waits for a long prompt's, whichever came first, and the
    long one goes on however many short ones come. `prefilling` is in order of arrival, which also
    decides between prompts that have as much left.

    A chunk that doesn't reach the end of its prompt ends with a block where it can, so that
    every block is sealed as early as possible.
    """
    # One without room takes no row.
    prefilling = [sequence for sequence in prefilling if num_open(sequence) > 0]
    if not prefilling or token_budget <= 0 or max_rows <= 0:
        return []
    oldest = prefilling[0]
    kept = kept_for_the_oldest(token_budget, oldest, block_size)
    # The oldest's row is kept as well.
    rows = sorted(prefilling, key=_num_left)[:max_rows]
    if oldest not in rows:
        rows[-1] = oldest
    chunks: list[Chunk] = []
    for sequence in rows:
        others = kept if sequence is not oldest else 0
        num_tokens = min(num_open(sequence), token_budget - others)
        if num_tokens <= 0:
            continue
        if num_tokens < _num_left(sequence):
            overhang = (sequence.num_scheduled_tokens + num_tokens) % block_size
            if overhang < num_tokens:
                num_tokens -= overhang
        chunks.append(Chunk(sequence, num_tokens))
        token_budget -= num_tokens
        if sequence is oldest:
            kept = 0
    return chunks


def kept_for_the_oldest(token_budget: int, oldest: Sequence, block_size: int) -> int:
    """Tokens of a step that are the oldest's, however many shorter ones there are."""
    return min(num_open(oldest), max(token_budget // _SHARE_OF_THE_OLDEST, block_size))


def _num_left(sequence: Sequence) -> int:
    return sequence.num_prompt_tokens - sequence.num_scheduled_tokens


def num_open(sequence: Sequence) -> int:
    """Of what is left, that for which there is room: a windowed group has it for a stretch at a
    time."""
    return min(_num_left(sequence), sequence.num_room_tokens - sequence.num_scheduled_tokens)
