"""The batch's state on the device, against plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from baton.kernels.batch_state import begin_step, scatter
from baton.kernels.reference_state import begin_step_reference, scatter_reference


@pytest.mark.parametrize("num_updates", [0, 1, 3, 128, 129, 300])
def test_scatter_writes_only_the_given_offsets(device: torch.device, num_updates: int) -> None:
    state = torch.randint(-100, 100, (1000,), dtype=torch.int32, device=device)
    updates = torch.stack(
        [torch.randperm(1000)[:num_updates], torch.randint(-(2**31), 2**31, (num_updates,))]
    ).to(torch.int32)
    updates = updates.to(device)
    updates[0, ::7] = -1
    expected = state.clone()
    scatter_reference(expected, updates)
    scatter(state, updates)
    assert torch.equal(state, expected)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize(
    ("num_rows", "num_groups", "num_slot_groups"), [(1, 1, 0), (5, 3, 2), (128, 1, 1), (131, 2, 0)]
)
def test_begin_step(
    device: torch.device,
    poisoned: Callable[..., Tensor],
    block_size: int,
    num_rows: int,
    num_groups: int,
    num_slot_groups: int,
) -> None:
    num_slots, max_blocks = num_rows + 9, 4
    rows = torch.randperm(num_slots)[:num_rows].to(torch.int32)
    rows[torch.rand(num_rows) < 0.3] = -1
    rows = rows.to(device)
    lens = torch.randint(0, max_blocks * block_size, (num_slots,), dtype=torch.int32)
    tokens = torch.randint(0, 128_256, (num_slots,), dtype=torch.int32, device=device)
    # Large ids: places exceed 32 bits. Entries beyond a row's blocks, and the row stride, are wild.
    tables = poisoned(num_groups, num_slots, max_blocks + 3, dtype=torch.int32)[..., :max_blocks]
    for slot, length in enumerate(lens.tolist()):
        used = length // block_size + 1
        tables[:, slot, :used] = torch.randint(0, 2**31 - 1, (num_groups, used)).to(tables)
    results = []
    for function in (begin_step_reference, begin_step):
        context_lens = lens.to(device, copy=True)
        outputs = [
            poisoned(num_rows + 2, dtype=torch.int32),
            poisoned(num_rows + 2, dtype=torch.int32),
            poisoned(num_groups, num_rows + 2, dtype=torch.int64),
        ]
        function(
            *(rows, tokens, context_lens, tables, *outputs),
            block_size=block_size,
            num_slot_groups=num_slot_groups,
        )
        results.append((*outputs, context_lens))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_a_position_beyond_the_table_has_no_place(device: torch.device) -> None:
    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    context_lens = ints(31, 32)
    slots = torch.zeros(1, 2, dtype=torch.int64, device=device)
    tables = ints(4, 5, 6, 7).view(1, 2, 2)
    begin_step(
        ints(0, 1), ints(8, 9), context_lens, tables, ints(0, 0), ints(0, 0), slots, block_size=16
    )
    assert slots.tolist() == [[5 * 16 + 15, -1]]
    assert context_lens.tolist() == [32, 33]
