"""Masks over the vocabulary against plain torch, alone and in the engine's steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baton.kernels.reference_masks import LEAST
from baton.kernels.reference_masks import apply_token_masks as reference
from baton.kernels.token_masks import apply_token_masks
from baton.shared.engine.batch import BatchRow
from baton.shared.engine.device_masks import DeviceMasks


@pytest.mark.parametrize(("num_rows", "vocab"), [(1, 83), (5, 4096), (3, 9001)])
def test_masks(device: torch.device, num_rows: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(num_rows, vocab, generator=generator)
    logits[0, 7] = float("-inf")
    words = torch.from_numpy(
        np.random.default_rng(vocab).integers(-(2**31), 2**31, (num_rows, -(-vocab // 32)))
    ).to(torch.int32)
    rows = torch.arange(num_rows - 1, -1, -1, dtype=torch.int32)
    rows[num_rows // 2 :: 2] = -1
    expected = logits.clone()
    reference(expected, rows.long(), words)
    actual = logits.to(device)
    apply_token_masks(actual, rows.to(device), words.to(device))
    assert torch.equal(actual.cpu(), expected)
    without = rows < 0
    assert torch.equal(expected[without], logits[without])


def test_a_token_that_was_banned_is_left_and_no_number_is_seen(device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.tensor([[1.0, float("-inf"), float("nan"), 2.0]] * 2, dtype=dtype)
        logits = logits.to(device)
        masks = torch.tensor([[0b0010], [0b0110]], dtype=torch.int32, device=device)
        apply_token_masks(logits, torch.arange(2, dtype=torch.int32, device=device), masks)
        assert logits.isneginf().tolist() == [[True, False, False, True]] * 2
        assert logits[0, 1].isfinite() and logits[:, 2].isnan().all(), "allowed or not"
        if dtype is torch.float32:
            expected = torch.tensor([[1.0, float("-inf"), float("nan"), 2.0]])
            reference(expected, torch.zeros(1, dtype=torch.int64), masks[:1].cpu())
            assert expected[0, 1] == torch.tensor(LEAST) and expected[0, 2].isnan()


def test_no_mask_stays_behind_a_copy_that_failed(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """A later row at its place would be drawn under it."""
    masks = DeviceMasks(4, 64, device)
    constrained = BatchRow([5], 0, [[0]], masks=np.ones((1, 2), np.uint32))
    masks.send([constrained], [0, -1, -1, -1])
    with monkeypatch.context() as patched:
        patched.setattr(DeviceMasks, "_pinned", failing)
        with pytest.raises(MemoryError):
            masks.send([BatchRow([6], 0, [[0]])], [0, -1, -1, -1])
    masks.send([BatchRow([7], 0, [[0]])], [0, -1, -1, -1])
    logits = torch.zeros(4, 64, device=device)
    masks.apply(logits)
    assert not logits.any()


def failing(self: DeviceMasks, array: object) -> None:
    raise MemoryError
