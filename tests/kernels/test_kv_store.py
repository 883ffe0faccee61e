from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from baton.kernels.kv_store import store_kv

Make = Callable[..., torch.Tensor]


@pytest.mark.parametrize(
    ("tokens", "kv_heads", "head_dim", "block_size", "is_strided"),
    [
        (1, 2, 128, 16, False),
        (5, 1, 80, 32, True),
        (3, 3, 18, 16, True),
        (33, 8, 64, 16, True),
        (2, 5, 512, 16, False),
    ],
)
def test_what_has_a_slot_is_stored_and_nothing_else_is_touched(
    tokens: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    is_strided: bool,
    device: torch.device,
    dtype: torch.dtype,
    poisoned: Make,
) -> None:
    num_blocks, num_layers, layer = 6, 3, 1
    shape = (tokens, kv_heads, head_dim)
    if is_strided:
        # Keys lie as [heads, T, head_dim], values as a part of something wider.
        key = torch.randn(kv_heads, tokens, head_dim, device=device).to(dtype).transpose(0, 1)
        value = torch.randn(tokens, kv_heads + 2, head_dim, device=device).to(dtype)[:, 1:-1]
    else:
        key, value = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    slots = torch.randperm(num_blocks * block_size)[:tokens].to(device)
    slots[tokens // 2] = -1
    kv = poisoned(num_blocks + 1, kv_heads, num_layers, 2, block_size, head_dim, dtype=dtype)
    expected = kv.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, block_size)
            expected[block, :, layer, 0, offset] = key[token]
            expected[block, :, layer, 1, offset] = value[token]
    store_kv(key, value, kv, layer, slots)
    torch.testing.assert_close(kv, expected, rtol=0, atol=0, equal_nan=True)


def test_no_tokens(device: torch.device) -> None:
    empty = torch.empty(0, 2, 16, device=device)
    kv = torch.zeros(2, 2, 1, 2, 16, 16, device=device)
    store_kv(empty, empty, kv, 0, torch.empty(0, dtype=torch.int64, device=device))
    assert not kv.any()
