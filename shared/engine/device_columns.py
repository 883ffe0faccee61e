"""The prompt chunks of a step as columns for the device: pure arithmetic on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernels.prefill_attention import block_m_for, prefill_tiles
from shared.engine.batch import BatchRow

Int32s = npt.NDArray[np.int32]

_TOKEN_ALIGNMENT = 16
"""Steps are padded to so many tokens: kernels are compiled for such counts once."""


@dataclass(frozen=True, slots=True)
class StepColumns:
    """T tokens: decode rows (filled in on the device), chunks, padding. R of them draw.

    packed: int32, one after another, each from a multiple of 16 bytes on, for kernels are compiled
        for aligned pointers: slots [T] as int64, input_ids [T], positions [T], tiles [NT, 4],
        last [R] (which token), draw_rows [R] (which slot, −1 = padding).
    """

    packed: Int32s
    num_tokens: int
    num_padding: int
    """How many of the tokens, at the end."""
    num_drawn: int
    num_tiles: int
    block_m: int


def step_columns(
    decode_slots: Sequence[int],
    chunks: Sequence[tuple[int, BatchRow, bool]],
    num_drawn: int,
    *,
    block_size: int,
    head_dim: int,
    itemsize: int,
) -> StepColumns:
    """Columns of a step.

    Args:
        decode_slots: slots of the decode rows, then −1 as padding.
        chunks: (slot, row, whether a token is drawn behind it); their block tables are long enough.
        num_drawn: R, at least as many as draw.
        itemsize: bytes of an element of the cache.
    """
    num_decode = len(decode_slots)
    lens = [row.num_tokens for _, row, _ in chunks]
    num_real = num_decode + sum(lens)
    num_tokens = -(-num_real // _TOKEN_ALIGNMENT) * _TOKEN_ALIGNMENT
    drawn = [slot for slot, _, draws in chunks if draws]
    block_m = block_m_for(max(lens, default=1), head_dim, itemsize)
    query_start = num_decode + np.cumsum([0, *lens])
    tiles = prefill_tiles(
        query_start,
        np.array([slot for slot, _, _ in chunks], np.int64),
        np.array([row.position for _, row, _ in chunks], np.int64),
        block_m=block_m,
    )

    aligned = -(-num_drawn // 4) * 4
    packed = np.zeros(4 * num_tokens + tiles.size + 2 * aligned, np.int32)
    slots = packed[: 2 * num_tokens].view(np.int64)
    slots[:] = -1
    input_ids = packed[2 * num_tokens : 3 * num_tokens]
    positions = packed[3 * num_tokens : 4 * num_tokens]
    packed[4 * num_tokens :][: tiles.size] = tiles.reshape(-1)
    last, draw_rows = packed[4 * num_tokens + tiles.size :].reshape(2, aligned)
    num_last = sum(slot >= 0 for slot in decode_slots)
    last[:num_last] = np.arange(num_last)
    draw_rows[:] = -1
    draw_rows[: num_last + len(drawn)] = [*decode_slots[:num_last], *drawn]
    for (_, row, draws), first, end in zip(chunks, query_start[:-1], query_start[1:], strict=True):
        assert row.token_ids is not None
        where = np.arange(row.position, row.context_len)
        table = np.array(row.block_tables[0], np.int64)
        input_ids[first:end] = row.token_ids
        positions[first:end] = where
        slots[first:end] = table[where // block_size] * block_size + where % block_size
        if draws:
            last[num_last] = end - 1
            num_last += 1
    return StepColumns(packed, num_tokens, num_tokens - num_real, num_drawn, len(tiles), block_m)
