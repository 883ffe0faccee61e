from __future__ import annotations

import pytest
import torch

from baton.shared.transfer.interface import GroupBlocks, LocalPool


def test_views_cut_memory_into_blocks_and_heads() -> None:
    memory = torch.arange(2 * 24, dtype=torch.uint8)
    group = GroupBlocks(0, 2, 24, 3)
    pool = LocalPool(torch.cat([memory, memory[:5]]), (group,), "ab")
    assert torch.equal(pool.blocks(0), memory.view(2, 24))
    assert torch.equal(pool.words(0), memory.view(torch.int32).view(2, 3, 2))
    pool.blocks(0)[1, 0] = 99
    assert pool.memory[24] == 99


def test_each_group_has_its_own_part_and_those_that_share_one_the_same() -> None:
    memory = torch.arange(100, dtype=torch.uint8)
    groups = (GroupBlocks(0, 2, 24, 3), GroupBlocks(60, 3, 8, 1), GroupBlocks(0, 2, 24, 2))
    pool = LocalPool(memory, groups, "ab")
    assert torch.equal(pool.blocks(1), memory[60:84].view(3, 8))
    assert pool.words(1).shape == (3, 1, 2) and pool.words(2).shape == (2, 2, 3)
    assert pool.blocks(2).data_ptr() == pool.blocks(0).data_ptr() == memory.data_ptr()


def test_what_a_group_says_of_itself_is_what_a_peer_reads() -> None:
    group = GroupBlocks(60, 3, 8, 2)
    assert GroupBlocks.of(group.describe()) == group


BYTES = torch.zeros(64, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("memory", "groups"),
    [
        (torch.zeros(64, dtype=torch.int8), [(0, 1, 64, 1)]),
        (torch.zeros(2, 32, dtype=torch.uint8), [(0, 1, 64, 1)]),
        (torch.zeros(63, dtype=torch.uint8), [(0, 1, 64, 1)]),
        (BYTES, [(0, 0, 64, 1)]),
        (BYTES, [(0, 1, 64, 0)]),
        (BYTES, [(0, 1, 60, 4)]),
        (BYTES, [(0, 1, 0, 1)]),
        (BYTES, []),
        (BYTES, [(4, 1, 64, 1)]),
        (BYTES, [(2, 1, 32, 1)]),
        (BYTES, [(-4, 1, 32, 1)]),
        (BYTES, [(0, 1, 32, 1), (32, 1, 32, 3)]),
        (BYTES, [(0, 1, 32, 1), (32, 3, 16, 1)]),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    memory: torch.Tensor, groups: list[tuple[int, int, int, int]]
) -> None:
    with pytest.raises(ValueError):
        LocalPool(memory, tuple(GroupBlocks(*numbers) for numbers in groups), "ab")
