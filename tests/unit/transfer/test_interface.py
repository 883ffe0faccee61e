from __future__ import annotations

import pytest
import torch

from baton.shared.transfer.interface import LocalPool


def test_views_cut_memory_into_blocks_and_heads() -> None:
    memory = torch.arange(2 * 24, dtype=torch.uint8)
    pool = LocalPool(torch.cat([memory, memory[:5]]), 2, 24, 3, "ab")
    assert torch.equal(pool.blocks(), memory.view(2, 24))
    assert torch.equal(pool.words(), memory.view(torch.int32).view(2, 3, 2))
    pool.blocks()[1, 0] = 99
    assert pool.memory[24] == 99


@pytest.mark.parametrize(
    ("memory", "num_blocks", "block_bytes", "num_heads"),
    [
        (torch.zeros(64, dtype=torch.int8), 1, 64, 1),
        (torch.zeros(2, 32, dtype=torch.uint8), 1, 64, 1),
        (torch.zeros(63, dtype=torch.uint8), 1, 64, 1),
        (torch.zeros(64, dtype=torch.uint8), 0, 64, 1),
        (torch.zeros(64, dtype=torch.uint8), 1, 64, 0),
        (torch.zeros(64, dtype=torch.uint8), 1, 60, 4),
        (torch.zeros(64, dtype=torch.uint8), 1, 0, 1),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    memory: torch.Tensor, num_blocks: int, block_bytes: int, num_heads: int
) -> None:
    with pytest.raises(ValueError):
        LocalPool(memory, num_blocks, block_bytes, num_heads, "ab")
