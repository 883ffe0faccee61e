"""Which prompts enter the pool, and which of their tokens a step computes. Pure policy."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from baton.shared.kv.sequence import Sequence


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
    prefilling: Iterable[Sequence], *, token_budget: int, max_rows: int, block_size: int
) -> list[Chunk]:
    """First come, first served, until the step's token budget is spent.

    A chunk that doesn't reach the end of its prompt ends with a block where it can, so that
    every block is sealed as early as possible.
    """
    chunks: list[Chunk] = []
    for sequence in prefilling:
        if token_budget <= 0 or len(chunks) >= max_rows:
            break
        left = sequence.num_prompt_tokens - sequence.num_scheduled_tokens
        # A windowed group has room for a stretch at a time.
        num_tokens = min(
            left, token_budget, sequence.num_room_tokens - sequence.num_scheduled_tokens
        )
        if num_tokens <= 0:
            continue
        if num_tokens < left:
            overhang = (sequence.num_scheduled_tokens + num_tokens) % block_size
            if overhang < num_tokens:
                num_tokens -= overhang
        chunks.append(Chunk(sequence, num_tokens))
        token_budget -= num_tokens
    return chunks
