"""Rows that bring drafts along, against plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from baton.kernels.drafts import accept_drafts, begin_drafted_step
from baton.kernels.reference_state import accept_drafts_reference, begin_drafted_step_reference


def _rows(num_rows: int, num_slots: int, device: torch.device) -> Tensor:
    rows = torch.randperm(num_slots)[:num_rows].to(torch.int32)
    rows[torch.rand(num_rows) < 0.3] = -1
    return rows.to(device)


@pytest.mark.parametrize(
    ("num_rows", "num_drafts", "num_more", "num_groups", "num_slot_groups"),
    [(1, 1, 0, 1, 0), (5, 3, 0, 2, 1), (131, 4, 0, 1, 0), (5, 1, 3, 1, 0)],
)
def test_begin_drafted_step(
    device: torch.device,
    poisoned: Callable[..., Tensor],
    num_rows: int,
    num_drafts: int,
    num_more: int,
    num_groups: int,
    num_slot_groups: int,
) -> None:
    """Short rows are padded with tokens that have no place and no row. There may be room for more
    drafts than a step has."""
    num_slots, max_blocks, block_size = num_rows + 3, 4, 16
    rows = _rows(num_rows, num_slots, device)
    # Some rows end behind their table: those tokens have no place.
    lens = torch.randint(0, max_blocks * block_size, (num_slots,), dtype=torch.int32)
    tokens = torch.randint(0, 128_256, (num_slots,), dtype=torch.int32, device=device)
    tables = torch.randint(0, 2**31 - 1, (num_groups, num_slots, max_blocks), dtype=torch.int32)
    most_drafts = num_drafts + num_more
    drafts = torch.randint(0, 128_256, (num_slots, most_drafts), dtype=torch.int32, device=device)
    counts = torch.randint(0, num_drafts + 1, (num_slots,), dtype=torch.int32, device=device)
    num_tokens = num_rows * (num_drafts + 1)
    results = []
    for function in (begin_drafted_step_reference, begin_drafted_step):
        context_lens = lens.to(device, copy=True)
        outputs = [
            poisoned(num_tokens + 2, dtype=torch.int32),
            poisoned(num_tokens + 2, dtype=torch.int32),
            poisoned(num_groups, num_tokens + 2, dtype=torch.int64),
            poisoned(num_tokens, dtype=torch.int32),
            poisoned(num_tokens, dtype=torch.int32),
        ]
        function(
            rows,
            tokens,
            context_lens,
            tables.to(device),
            drafts,
            counts,
            *outputs,
            block_size=block_size,
            num_slot_groups=num_slot_groups,
        )
        results.append((*outputs, context_lens))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("num_rows", "num_drafts"), [(1, 1), (7, 3), (131, 4)])
def test_what_stands_is_what_was_drawn_up_to_the_first_wrong_draft(
    device: torch.device, num_rows: int, num_drafts: int
) -> None:
    num_slots, width = num_rows + 3, num_drafts + 1
    rows = _rows(num_rows, num_slots, device)
    counts = torch.randint(0, num_drafts + 1, (num_slots,), dtype=torch.int32, device=device)
    # Few values: drafts are often right, and sometimes behind a wrong one.
    drafts = torch.randint(0, 2, (num_slots, num_drafts), dtype=torch.int32, device=device)
    drawn = torch.randint(-1, 2, (num_rows * width,), dtype=torch.int32, device=device)
    results = []
    for function in (accept_drafts_reference, accept_drafts):
        token_ids = torch.full((num_slots,), 77, dtype=torch.int32, device=device)
        context_lens = torch.full((num_slots,), 50, dtype=torch.int32, device=device)
        standing = torch.full((num_rows,), 99, dtype=torch.int32, device=device)
        function(rows, drawn, drafts, counts, token_ids, context_lens, standing)
        results.append((token_ids, context_lens, standing))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)
