"""Batch: what one step of the engine computes, as a scheduler's rows and as columns of arrays."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from baton.kernels.state_plan import Kept
from baton.shared.engine.shaping import History, Shaping
from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.sampling import SamplingParams
from baton.shared.token_masks import TokenMasks

if TYPE_CHECKING:
    from torch import Tensor

Ints = npt.NDArray[np.int64]

NOT_STORED = -(1 << 40)
"""In a slot mapping: the token's keys and values are in the blocks already."""


@dataclass(eq=False, slots=True)
class RowHandle:
    """A sequence's place in the engine's state, from its first step to its last.

    Made and given back by `ModelRunner.open_row` and `close_row`; the rest is the runner's own
    knowledge of what lies on the device.
    """

    slot: int
    sampling: SamplingParams
    sample_index: int
    shaping: Shaping | None = None
    """What changes its logits before a token is drawn."""
    is_sent: bool = False
    """The sampling parameters are on the device."""
    is_marked: bool = False
    """So is what its tokens have been to it, for `shaping`."""
    num_bans: int = -1
    """As the device has it; below zero: not known."""
    context_len: int = -1
    """As `drawn_at`: the highest that it may be."""
    num_blocks: list[int] = field(default_factory=list)
    """Entries of the block tables that are on the device, by cache group: behind a window a table
    may be shorter than the others, as long as a prompt is computed."""
    num_drafts: int = -1
    """As the device has it; below zero: not known, for another sequence had the slot before."""
    drawn_at: int = -1
    """Position of the token that was drawn last; it is the input of the next row there. The highest
    that it may be, until the steps with drafts that were launched are known."""
    drawn_token: int = -1
    """That token, where the host knows it."""
    shift: int = 0
    """Its rows are so many positions further on in the sequence than they say: a cache that lacks
    tokens counts those that it has. What is drawn, and what has a say in it, goes by the
    sequence's."""

    def move(self, shift: int) -> None:
        """Sets `shift`: what depends on it is sent again."""
        if shift != self.shift:
            self.shift = shift
            self.is_sent = self.is_marked = False

    def gave_back(self, block_tables: Sequence[Sequence[int]]) -> None:
        """The tables end earlier than they did: what lay there is sent when it is taken again."""
        self.num_blocks = [
            min(count, len(table))
            for count, table in zip(self.num_blocks, block_tables, strict=False)
        ]

    def take_back(self) -> None:
        """What was drawn last does not count: where the sequence is will be sent again."""
        self.is_marked = False
        self.context_len = self.drawn_at = -1

    def fell_short(self, num_tokens: int) -> None:
        """So many drafts of a step were not what was drawn: all that was launched since then is
        that many positions further back."""
        if self.drawn_at >= 0:
            self.drawn_at -= num_tokens
        if self.context_len >= 0:
            self.context_len -= num_tokens


@dataclass(frozen=True, slots=True)
class WantedLogprobs:
    """Tokens of a prompt whose logprobs are wanted of a row: they follow tokens of the row."""

    first: int
    """Which of the row's tokens the first of them follows."""
    token_ids: Sequence[int]
    num_top: int
    """How many of the likeliest in its place are told of each."""


@dataclass(slots=True)
class BatchRow:
    """One sequence's part of a step."""

    token_ids: Sequence[int] | None
    """Tokens whose KV is computed in this step; None: the one that was drawn last for `handle`,
    which the host may not know yet."""
    position: int
    """Position of the first of them; the KV of all earlier ones is in the blocks already. Where
    `token_ids` is None, the highest that it may be (`RowHandle.drawn_at`)."""
    block_tables: Sequence[Sequence[int]]
    """[group][logical block] → block id, at least up to the last token; NO_BLOCK where no token
    from `position` on reads. Of a group of states: its one slot, which the row changes."""
    sampling: SamplingParams | None = None
    """How to draw the token that follows the last one; None: draw none."""
    sample_index: int = 0
    """Which of the samples of one request this is."""
    handle: RowHandle | None = None
    """None: nothing is kept of this row after the step."""
    draft_ids: Sequence[int] = ()
    """Guesses of what is drawn behind a row of one token, computed along with it. A token is drawn
    behind each of them too; what stands is what was drawn up to the first guess that it is not. On
    a GPU they may still be in the making (coming_guesses.py)."""
    masks: TokenMasks | None = None
    """Which tokens may be drawn behind the last one that is known, and behind each draft; None:
    any."""
    num_logits: int = 1
    """How many of the row's last tokens `logits` is asked for."""
    history: History | None = None
    """Of a row without a handle, where `sampling` asks what was before."""
    prompt_logprobs: WantedLogprobs | None = None
    """Wanted of a chunk of a prompt, whether it draws a token or not."""
    features: Tensor | None = None
    """[num_tokens, hidden], what such a model gets with each token."""
    keeps: Sequence[tuple[int, Sequence[int]]] = ()
    """(how many of the row's tokens, by cache group a slot or NO_BLOCK): the states behind these
    tokens go there too, whatever is there; ascending."""
    num_stored: int = 0
    """Positions below this have their keys and values in the blocks already, which others read: of
    what is computed there nothing is stored but states."""

    @property
    def num_known(self) -> int:
        """Tokens before the drafts."""
        return 1 if self.token_ids is None else len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        return self.num_known + len(self.draft_ids)

    @property
    def is_chunk(self) -> bool:
        """Of a prompt, computed as such; one token may be decoded instead if nothing more is asked
        of it."""
        return (
            self.num_known > 1
            or self.prompt_logprobs is not None
            or self.position < self.num_stored
        )

    @property
    def shift(self) -> int:
        """As of its handle."""
        return 0 if self.handle is None else self.handle.shift

    @property
    def context_len(self) -> int:
        return self.position + self.num_tokens


@dataclass(frozen=True, slots=True)
class ChainRow:
    """Of whom a chain of guesses is made: its tokens that are not in the cache, then guesses, each
    computed to draw the next one."""

    row: BatchRow
    """With a handle, and blocks for all but the last guess."""
    num_guesses: int
    states: Sequence[Tensor] = ()
    """Of a head, which takes these instead of `row.features`: in parts, the larger model's hidden
    states [num_tokens, taps · hidden] that come with the tokens."""

    @property
    def end(self) -> int:
        """How many of its tokens are in the cache in the end, guesses included."""
        return self.row.context_len + self.num_guesses - 1


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one step, in any order."""

    rows: Sequence[BatchRow]

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    def columns(self, block_size: int, slot_groups: Collection[int] = ()) -> BatchColumns:
        """The rows as arrays. `slot_groups`: those of states.

        Raises:
            ValueError: a row is empty or its block table too short.
        """
        return _columns(self.rows, block_size, slot_groups)


@dataclass(frozen=True, slots=True)
class BatchColumns:
    """R rows with T tokens: rows of one token first, longest context first; all int64.

    The order makes decoding rows one slice, and rows with as many key tiles a prefix of it.
    """

    order: list[int]
    """Row i here is the caller's row order[i]."""
    input_ids: Ints
    """[T]"""
    positions: Ints
    """[T]"""
    query_start: Ints
    """[R + 1]: tokens query_start[i] … query_start[i + 1] − 1 are row i's."""
    context_lens: Ints
    """[R]: tokens of each row whose KV is there after the step."""
    block_tables: list[Ints]
    """By group, [R, blocks of the longest row]; NO_BLOCK in holes and beyond a row's context. Of a
    group of states [R, 1]."""
    slot_mapping: list[Ints]
    """By group, [T]: block id · block_size + offset at which each token's KV is stored, or
    NOT_STORED. Of a group of states the row's slot."""
    kept: Sequence[Sequence[Kept]] = ()
    """By group, of groups of states, what rows keep; by row."""
    num_drafts: Ints | None = None
    """[R]: how many of each row's last tokens are guesses; None: none are."""


def _columns(
    rows: Sequence[BatchRow], block_size: int, slot_groups: Collection[int]
) -> BatchColumns:
    order = sorted(
        range(len(rows)),
        key=lambda i: (rows[i].num_tokens > 1, -rows[i].context_len),
    )
    ordered = [rows[i] for i in order]
    num_rows = len(ordered)
    lens = np.fromiter((row.num_tokens for row in ordered), np.int64, num_rows)
    first = np.fromiter((row.position for row in ordered), np.int64, num_rows)
    if num_rows == 0 or lens.min() < 1:
        raise ValueError("a batch needs rows and each row a token")
    query_start = np.zeros(num_rows + 1, np.int64)
    np.cumsum(lens, out=query_start[1:])
    num_tokens = int(query_start[-1])
    row_of_token = np.repeat(np.arange(num_rows), lens)
    positions = np.arange(num_tokens) - query_start[row_of_token] + first[row_of_token]

    context_lens = first + lens
    num_blocks = -(-context_lens // block_size)
    one_slot = np.ones(num_rows, np.int64)
    block_tables = [
        _block_table(
            [row.block_tables[group] for row in ordered],
            one_slot if group in slot_groups else num_blocks,
        )
        for group in range(len(ordered[0].block_tables))
    ]
    block_of_token, offset = np.divmod(positions, block_size)
    num_stored = np.fromiter((row.num_stored for row in ordered), np.int64, num_rows)
    is_stored = positions < num_stored[row_of_token]
    return BatchColumns(
        order=order,
        input_ids=np.fromiter(
            chain.from_iterable(chain(_token_ids(row), row.draft_ids) for row in ordered),
            np.int64,
            num_tokens,
        ),
        positions=positions,
        query_start=query_start,
        context_lens=context_lens,
        block_tables=block_tables,
        slot_mapping=[
            table[row_of_token, 0]
            if group in slot_groups
            else np.where(
                is_stored, NOT_STORED, table[row_of_token, block_of_token] * block_size + offset
            )
            for group, table in enumerate(block_tables)
        ],
        kept=[kept_states(ordered, group) for group in range(len(block_tables))],
        num_drafts=np.array([len(row.draft_ids) for row in ordered], np.int64)
        if any(row.draft_ids for row in ordered)
        else None,
    )


def kept_states(rows: Sequence[BatchRow], group: int) -> list[Kept]:
    """What rows keep of a group of states."""
    return [
        Kept(number, num_tokens, slots[group])
        for number, row in enumerate(rows)
        for num_tokens, slots in row.keeps
        if slots[group] != NO_BLOCK
    ]


def _token_ids(row: BatchRow) -> Sequence[int]:
    if row.token_ids is not None:
        return row.token_ids
    if row.handle is None or row.handle.drawn_at != row.position:
        raise ValueError("a row without tokens, for which none was drawn")
    return (row.handle.drawn_token,)


def _block_table(tables: Sequence[Sequence[int]], num_blocks: Ints) -> Ints:
    """[R, max(num_blocks)]: the first num_blocks[i] ids of each row's table, then −1."""
    counts = num_blocks.tolist()
    if any(len(table) < count for table, count in zip(tables, counts, strict=True)):
        raise ValueError("a block table is shorter than its row's context")
    needed = (
        table if len(table) == count else table[:count]
        for table, count in zip(tables, counts, strict=True)
    )
    padded = np.full((len(tables), max(counts)), -1, np.int64)
    filled = np.arange(max(counts)) < num_blocks[:, None]
    padded[filled] = np.fromiter(chain.from_iterable(needed), np.int64, int(num_blocks.sum()))
    return padded
