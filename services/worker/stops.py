"""Where states of a prompt are kept (`Sequence.stops`): at the last block edge that the same prompt
can begin from, and where prompts branch, which is seen when the second comes. Pure policy."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from baton.shared.kv.sequence import Sequence

LEAST_GAIN_BLOCKS = 2
"""At a branch, no state is kept for less than so many blocks behind the one before."""


def of_prompt(num_usable: int, branch: int, depth: int, block_size: int) -> tuple[int, ...]:
    """Of a prompt that begins `depth` blocks behind its beginning, and of which a later one can
    begin `num_usable` blocks behind it.

    branch: blocks that it has in common with another prompt, which goes on differently; 0: none.
    """
    blocks = {num_usable}
    if branch - depth >= LEAST_GAIN_BLOCKS:
        blocks.add(branch)
    return tuple(sorted(index * block_size for index in blocks if index > depth))


def is_coming(
    sequence: Sequence, others: Iterable[Sequence], depth: int, most: int, block_size: int
) -> bool:
    """Whether one of `others`, whose prompts are being computed, is about to keep a state behind
    more than `depth` blocks that this one begins with, too, of at most `most`. One that has not
    come so far yet keeps one where they part."""
    is_any = False
    for other in others:
        common = min(most, num_common(sequence.block_hashes, other.block_hashes))
        if common - depth < LEAST_GAIN_BLOCKS:
            continue
        branch = common * block_size
        if branch > other.num_scheduled_tokens and branch not in other.stops:
            other.stops = tuple(sorted((*other.stops, branch)))
        is_any |= any(
            max(other.num_computed_tokens, depth * block_size) < stop <= branch
            for stop in other.stops
        )
    return is_any


def num_common(ours: Seq[bytes], theirs: Seq[bytes]) -> int:
    """Blocks at the front that two prompts have in common: hashes are chained."""
    low, high = 0, min(len(ours), len(theirs))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if ours[middle - 1] == theirs[middle - 1] else (low, middle - 1)
    return low
