"""The columns of a step's prompt chunks, against places that are worked out token by token."""

from __future__ import annotations

import random

import numpy as np
import pytest

from baton.shared.engine.batch import BatchRow
from baton.shared.engine.device_columns import step_columns

BLOCK_SIZE = 16


@pytest.mark.parametrize("seed", range(20))
def test_every_token_has_its_place(seed: int) -> None:
    rng = random.Random(seed)
    decode = rng.sample(range(50), rng.randrange(5))
    decode_slots = decode + [-1] * rng.choice([0, 3])
    chunks = [(slot, _chunk(rng), rng.random() < 0.5) for slot in range(50, 51 + rng.randrange(4))]
    drawing = [slot for slot, _, draws in chunks if draws]
    num_drawn = len(decode) + len(drawing) + rng.randrange(3)
    columns = step_columns(
        decode_slots, chunks, num_drawn, block_size=BLOCK_SIZE, head_dim=64, itemsize=2
    )

    num_tokens = columns.num_tokens
    assert num_tokens % 16 == 0
    packed = columns.packed
    slots = packed[: 2 * num_tokens].view(np.int64).tolist()
    input_ids, positions = packed[2 * num_tokens : 4 * num_tokens].reshape(2, -1).tolist()
    tiles, rest = np.split(packed[4 * num_tokens :], [4 * columns.num_tiles])
    last, draw_rows = rest.reshape(2, -1)[:, :num_drawn].tolist()

    assert slots[: len(decode_slots)] == [-1] * len(decode_slots)
    expected_last, token = list(range(len(decode))), len(decode_slots)
    covered = []
    for slot, row, draws in chunks:
        assert row.token_ids is not None
        [table] = row.block_tables
        for offset, token_id in enumerate(row.token_ids):
            position = row.position + offset
            block_id = table[position // BLOCK_SIZE]
            assert slots[token] == block_id * BLOCK_SIZE + position % BLOCK_SIZE
            assert (input_ids[token], positions[token]) == (token_id, position)
            covered.append((token, slot, position))
            token += 1
        if draws:
            expected_last.append(token - 1)
    assert slots[token:] == [-1] * columns.num_padding
    assert last[: len(expected_last)] == expected_last
    assert draw_rows == decode + drawing + [-1] * (num_drawn - len(expected_last))
    in_tiles = [
        (first + offset, slot, position + offset)
        for first, count, slot, position in tiles.reshape(-1, 4).tolist()
        for offset in range(count)
    ]
    assert sorted(in_tiles) == covered


def test_parts_begin_where_kernels_are_compiled_for() -> None:
    rng = random.Random(7)
    for num_drawn in range(6):
        columns = step_columns(
            [3, -1], [(1, _chunk(rng), False)], num_drawn, block_size=16, head_dim=64, itemsize=2
        )
        assert len(columns.packed) % 4 == 0


def _chunk(rng: random.Random) -> BatchRow:
    position, num_tokens = rng.choice([0, rng.randrange(100)]), rng.randint(1, 200)
    num_blocks = -(-(position + num_tokens) // BLOCK_SIZE) + rng.randrange(3)
    table = [rng.randrange(1000) for _ in range(num_blocks)]
    token_ids = [rng.randrange(2**17) for _ in range(num_tokens)]
    return BatchRow(token_ids, position, [table])
