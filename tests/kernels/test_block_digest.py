"""Sums of blocks are those of the digest, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from baton.kernels.block_digest import DigestConfig, block_sums, digest_weights
from baton.kernels.reference_state import block_sums_reference
from baton.shared.kv import digest

_SHAPES = [(1, 64), (2, 64), (3, 100), (8, 1024), (5, 1500), (2, 4100)]
_CONFIGS = [
    None,
    DigestConfig(group=4, chunk=64, splits=1, num_warps=1),
    DigestConfig(group=2, chunk=256, splits=3, num_warps=2),
    DigestConfig(group=2, chunk=512, splits=2, num_warps=4, table=True),
]


def _words(num_blocks: int, heads: int, words: int, device: torch.device) -> Tensor:
    values = torch.randint(-(2**31), 2**31, (num_blocks, heads, words), dtype=torch.int64)
    return values.to(device, torch.int32)


@pytest.mark.parametrize("config", _CONFIGS)
@pytest.mark.parametrize("shape", _SHAPES)
def test_sums_equal_the_digest(
    device: torch.device,
    poisoned: Callable[..., Tensor],
    shape: tuple[int, int],
    config: DigestConfig | None,
) -> None:
    words = _words(7, *shape, device)
    words[3] = 0
    words[4] = -(2**31)
    block_ids = torch.tensor([6, 0, 3, 4, 6], dtype=torch.int32, device=device)
    out = poisoned(5, shape[0], dtype=torch.int64)
    result = block_sums(words, block_ids, out=out, config=config)
    assert result is out
    assert torch.equal(out, block_sums_reference(words, block_ids))
    expected = digest.block_sums(words[block_ids.long()])
    assert np.array_equal(out.cpu().numpy().view(np.uint64), expected)


def test_blocks_of_a_pool_of_16_bit_values(device: torch.device) -> None:
    pool = torch.randn(4, 2, 3, 2, 16, 8, device=device).to(torch.float16)
    words = pool.view(torch.int32).view(4, 2, -1)
    block_ids = torch.tensor([2, 1], device=device)
    expected = block_sums_reference(words, block_ids)
    assert torch.equal(block_sums(words, block_ids), expected)
    # Heads of a wider pool: neither blocks nor heads adjacent.
    wide = torch.stack([words, words.flip(0)], 2).flip(1)
    assert torch.equal(block_sums(wide[:, :, 0], block_ids), expected.flip(1))


def test_no_blocks(device: torch.device) -> None:
    words = _words(2, 3, 64, device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    assert block_sums(words, none).shape == (0, 3)


def test_the_table_holds_the_digests_weights(device: torch.device) -> None:
    word = torch.ones(1, 1, 1, dtype=torch.int32, device=device)
    weights = digest_weights(70, device)
    assert bool((weights & 1).all())
    for index in (0, 1, 69):
        words = torch.zeros(1, 1, 70, dtype=torch.int32, device=device)
        words[..., index] = word
        assert int(digest.block_sums(words)[0, 0]) == int(weights[index]) % 2**64
