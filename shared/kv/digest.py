"""Digest of a block: one wrap-around 64-bit weighted sum per (block, KV head).

    digest = Σ weight[i] · word[i]  +  seed(incarnation, block id, generation, head)      mod 2⁶⁴

The words are the head's bytes read as int32, the weights odd, so that any one changed word
changes the sum. The seed ties a digest to one copy in one pool at one time: blocks that were
swapped, moved or reused differ even where their bytes agree. The sum is the same on every
device, and it is the part that survives a copy: a reader checks it against the source's seed
and adds its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

Uint64Array = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_WORDS_AT_ONCE = 1 << 20


def _mix(x: Uint64Array) -> Uint64Array:
    """Finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
    Generators, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=8)
def _weights(num_words: int, device: torch.device) -> torch.Tensor:
    """[num_words] int64, odd."""
    with np.errstate(over="ignore"):
        weights = _mix((np.arange(num_words, dtype=np.uint64) + np.uint64(1)) * _GAMMA)
    return torch.from_numpy((weights | np.uint64(1)).view(np.int64)).to(device)


def block_sums(words: torch.Tensor) -> Uint64Array:
    """Weighted sums of blocks, without their seeds.

    `words`: [n, num_heads, num_words] int32, any device. Returns [n, num_heads] uint64.
    """
    num_blocks, num_heads, num_words = words.shape
    weights = _weights(num_words, words.device)
    sums = torch.empty(num_blocks, num_heads, dtype=torch.int64, device=words.device)
    stride = max(1, _WORDS_AT_ONCE // (num_heads * num_words))
    for start in range(0, num_blocks, stride):
        part = words[start : start + stride].to(torch.int64)
        sums[start : start + stride] = part.mul_(weights).sum(-1)
    return sums.cpu().numpy().view(np.uint64)


def seeds(
    incarnation: str, block_ids: Sequence[int], generations: Sequence[int], num_heads: int
) -> Uint64Array:
    """What ties digests to copies. `incarnation`: hex digits. Returns [n, num_heads] uint64."""
    with np.errstate(over="ignore"):
        state = _mix(np.array(int(incarnation[:16], 16), dtype=np.uint64) + _GAMMA)
        state = _mix((state ^ np.array(block_ids, dtype=np.uint64)) + _GAMMA)
        state = _mix((state ^ np.array(generations, dtype=np.uint64)) + _GAMMA)
        heads = np.arange(num_heads, dtype=np.uint64)
        return _mix((state[:, None] ^ heads[None, :]) + _GAMMA)


def digests(sums: Uint64Array, seed: Uint64Array) -> Uint64Array:
    """[n, num_heads] uint64 from sums and seeds of the same shape."""
    with np.errstate(over="ignore"):
        return sums + seed


def sums(digest: Uint64Array, seed: Uint64Array) -> Uint64Array:
    """[n, num_heads] uint64: what blocks must sum to that have these digests."""
    with np.errstate(over="ignore"):
        return digest - seed
