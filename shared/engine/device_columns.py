"""The prompt chunks of a step as columns for the device: pure arithmetic on the host."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from baton.kernels.prefill_attention import block_m_for, prefill_tiles
from baton.shared.engine.batch import BatchRow

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
    starts = list(accumulate(lens, initial=num_decode))
    num_real = starts[-1]
    num_tokens = -(-num_real // _TOKEN_ALIGNMENT) * _TOKEN_ALIGNMENT
    block_m = block_m_for(max(lens, default=1), head_dim, itemsize)
    tiles = prefill_tiles(
        np.array(starts, np.int64),
        np.array([slot for slot, _, _ in chunks], np.int64),
        np.array([row.position for _, row, _ in chunks], np.int64),
        block_m=block_m,
    )

    aligned = -(-num_drawn // 4) * 4
    packed = np.zeros(4 * num_tokens + tiles.size + 2 * aligned, np.int32)
    slots = packed[: 2 * num_tokens].view(np.int64)
    slots[:num_decode] = slots[num_real:] = -1
    input_ids = packed[2 * num_tokens : 3 * num_tokens]
    positions = packed[3 * num_tokens : 4 * num_tokens]
    packed[4 * num_tokens :][: tiles.size] = tiles.reshape(-1)
    for (_, row, _), first, end in zip(chunks, starts[:-1], starts[1:], strict=True):
        assert row.token_ids is not None
        input_ids[first:end] = np.frombuffer(array("i", row.token_ids), np.int32)
        positions[first:end] = np.arange(row.position, row.context_len, dtype=np.int32)
        slots[first:end] = _slots(row, block_size)
    last, draw_rows = packed[4 * num_tokens + tiles.size :].reshape(2, aligned)
    decoding = [(index, slot) for index, slot in enumerate(decode_slots) if slot >= 0]
    ends = zip(chunks, starts[1:], strict=True)
    drawn = decoding + [(end - 1, slot) for (slot, _, draws), end in ends if draws]
    draw_rows[:] = -1
    if drawn:
        last[: len(drawn)], draw_rows[: len(drawn)] = zip(*drawn, strict=True)
    return StepColumns(packed, num_tokens, num_tokens - num_real, num_drawn, len(tiles), block_m)


def _slots(row: BatchRow, block_size: int) -> npt.NDArray[np.int64]:
    """Where the pool has the row's tokens."""
    first, end = row.position // block_size, -(-row.context_len // block_size)
    blocks = np.array(row.block_tables[0][first:end], np.int64) * block_size
    slots = (blocks[:, None] + np.arange(block_size)).reshape(-1)
    return slots[row.position - first * block_size :][: row.num_tokens]
