"""Batch: what one step of the engine computes, as a scheduler's rows and as columns of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from shared.kv.sequence import SamplingParams

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One sequence's part of a step."""

    token_ids: Sequence[int]
    """Tokens whose KV is computed in this step; at least one."""
    position: int
    """Position of the first of them; the KV of all earlier ones is in the blocks already."""
    block_tables: Sequence[Sequence[int]]
    """[group][logical block] → block id, at least up to the last of `token_ids`."""
    sampling: SamplingParams | None = None
    """How to draw the token that follows the last one; None: draw none."""
    sample_index: int = 0
    """Which of the samples of one request this is."""

    @property
    def context_len(self) -> int:
        return self.position + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one step, in any order."""

    rows: Sequence[BatchRow]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)

    def columns(self, block_size: int) -> BatchColumns:
        """The rows as arrays.

        Raises:
            ValueError: a row is empty or its block table too short.
        """
        return _columns(self.rows, block_size)


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
    """By group, [R, blocks of the longest row]; −1 beyond a row's context."""
    slot_mapping: list[Ints]
    """By group, [T]: block id · block_size + offset at which each token's KV is stored."""


def _columns(rows: Sequence[BatchRow], block_size: int) -> BatchColumns:
    order = sorted(
        range(len(rows)),
        key=lambda i: (len(rows[i].token_ids) > 1, -rows[i].context_len),
    )
    ordered = [rows[i] for i in order]
    num_rows = len(ordered)
    lens = np.fromiter((len(row.token_ids) for row in ordered), np.int64, num_rows)
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
    block_tables = [
        _block_table([row.block_tables[group] for row in ordered], num_blocks)
        for group in range(len(ordered[0].block_tables))
    ]
    block_of_token, offset = np.divmod(positions, block_size)
    return BatchColumns(
        order=order,
        input_ids=np.fromiter(
            chain.from_iterable(row.token_ids for row in ordered), np.int64, num_tokens
        ),
        positions=positions,
        query_start=query_start,
        context_lens=context_lens,
        block_tables=block_tables,
        slot_mapping=[
            table[row_of_token, block_of_token] * block_size + offset for table in block_tables
        ],
    )


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
