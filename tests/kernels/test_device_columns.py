"""The columns of a step's prompt chunks, against places that are worked out token by token."""

from __future__ import annotations

import random

import pytest
import torch

from baton.shared.engine.batch import BatchRow
from baton.shared.engine.device_columns import chunk_columns

BLOCK_SIZE = 16


@pytest.mark.parametrize("seed", range(20))
def test_every_token_has_its_place(seed: int) -> None:
    rng = random.Random(seed)
    num_groups, num_decode = rng.choice([1, 1, 3]), rng.randrange(8)
    chunks = [(slot, _chunk(rng, num_groups)) for slot in range(50, 51 + rng.randrange(4))]
    wanted = [(rng.randrange(200), rng.randrange(50), rng.randrange(4)) for _ in range(seed % 7)]
    num_wanted = len(wanted) + rng.randrange(3)
    columns = chunk_columns(
        num_decode,
        chunks,
        wanted,
        num_wanted,
        num_groups=num_groups,
        block_size=BLOCK_SIZE,
        head_dim=64,
        itemsize=2,
    )

    num_tokens = columns.num_tokens
    assert num_tokens % 16 == 0
    sent = columns.unpack(torch.from_numpy(columns.packed))
    slots = sent.slots.numpy()
    input_ids, positions = sent.input_ids.tolist(), sent.positions.tolist()
    tokens, rows, back = sent.wanted.tolist(), sent.rows.tolist(), sent.back.tolist()

    assert (slots[:, :num_decode] == -1).all()
    token = num_decode
    covered = []
    for slot, row in chunks:
        assert row.token_ids is not None
        for offset, token_id in enumerate(row.token_ids):
            position = row.position + offset
            for group, table in enumerate(row.block_tables):
                place = table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
                is_stored = position < row.num_stored
                assert slots[group, token] < 0 if is_stored else slots[group, token] == place
            assert (input_ids[token], positions[token]) == (token_id, position)
            covered.append((token, slot, position))
            token += 1
    assert (slots[:, token:] == -1).all() and num_tokens - token == columns.num_padding
    padding = [(0, -1, 0)] * (num_wanted - len(wanted))
    assert list(zip(tokens, rows, back, strict=True)) == wanted + padding
    in_tiles = [
        (first + offset, slot, position + offset)
        for first, count, slot, position in sent.tiles.tolist()
        for offset in range(count)
    ]
    assert sorted(in_tiles) == covered


@pytest.mark.parametrize("seed", range(20))
def test_what_is_widened(seed: int) -> None:
    """Every key that a token sees is at its place among the blocks of one turn, and there is room
    for a turn; where a chunk sees more than that, nothing is widened."""
    rng = random.Random(seed)
    chunks = [(slot, _chunk(rng, 1)) for slot in range(50, 51 + rng.randrange(5))]
    needed = [-(-row.context_len // 128) for _, row in chunks]
    most = rng.randint(1, 6)
    columns = chunk_columns(
        3, chunks, [], 0, num_groups=1, block_size=BLOCK_SIZE, head_dim=64, itemsize=2,
        most_widened=most,
    )  # fmt: skip
    longest = max(row.num_tokens for _, row in chunks)
    sent = columns.unpack(torch.from_numpy(columns.packed))
    if longest <= 64 or max(needed) > most:
        assert not sent.widened and columns.block_m == (64 if longest > 32 else 16)
        return
    assert columns.block_m == 128
    tokens = ((slot, row) for slot, row in chunks for _ in range(row.num_tokens))
    owner = dict(enumerate(tokens, 3))
    seen = []
    for tiles, stretches in sent.widened:
        assert tiles.data_ptr() % 16 == stretches.data_ptr() % 16 == 0
        assert 0 < len(stretches) <= most
        for first, count, first_block, position in tiles.tolist():
            places = range(first_block * BLOCK_SIZE, first_block * BLOCK_SIZE + position + count)
            own, row = owner[first]
            for key, place in enumerate(places):
                slot, first_key, end, first_position = stretches[place // 128].tolist()
                assert (slot, first_key + place % 128) == (own, key)
                assert (first_position, end) == (row.position, row.context_len)
            seen += [(first + offset, position + offset) for offset in range(count)]
    in_tiles = [
        (first + offset, position + offset)
        for first, count, _, position in sent.tiles.tolist()
        for offset in range(count)
    ]
    assert sorted(seen) == sorted(in_tiles)


def test_columns_begin_at_16_bytes() -> None:
    """Kernels are compiled for aligned pointers."""
    rng = random.Random(1)
    for num_wanted in range(6):
        for num_groups in (1, 2):
            columns = chunk_columns(
                2,
                [(1, _chunk(rng, num_groups))],
                [],
                num_wanted,
                num_groups=num_groups,
                block_size=16,
                head_dim=64,
                itemsize=2,
            )
            assert len(columns.packed) % 4 == 0


def _chunk(rng: random.Random, num_groups: int) -> BatchRow:
    position, num_tokens = rng.choice([0, rng.randrange(100)]), rng.randint(1, 200)
    num_blocks = -(-(position + num_tokens) // BLOCK_SIZE) + rng.randrange(3)
    tables = [[rng.randrange(1000) for _ in range(num_blocks)] for _ in range(num_groups)]
    token_ids = [rng.randrange(2**17) for _ in range(num_tokens)]
    return BatchRow(token_ids, position, tables, num_stored=rng.choice([0, rng.randrange(150)]))
