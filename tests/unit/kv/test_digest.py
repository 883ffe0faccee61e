"""Digests of blocks: what they notice, and that every way to make one gives the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baton.shared.kv import digest as module
from baton.shared.kv.digest import block_sums, digests, seeds

INCARNATION = "0123456789abcdef" * 2
BITS = [1 << bit for bit in range(31)] + [-(1 << 31)]
GOLDEN = [
    (1470983659431871421, 11669046209286937847, 8643023053539050000),
    (5592087960798633840, 235148887828482492, 15207903932722703789),
]


def blocks(num_blocks: int, num_heads: int = 2, num_words: int = 24) -> torch.Tensor:
    """[num_blocks, num_heads, num_words] int32, random."""
    generator = torch.Generator().manual_seed(3)
    shape = (num_blocks, num_heads, num_words)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def digest_rows(
    words: torch.Tensor,
    block_ids: list[int],
    generations: list[int],
    incarnation: str = INCARNATION,
) -> list[tuple[int, ...]]:
    seed = seeds(incarnation, block_ids, generations, words.shape[1])
    return [tuple(row) for row in digests(block_sums(words), seed).tolist()]


def plain_sum(words: list[int], weights: list[int]) -> int:
    return sum(w * x for w, x in zip(weights, words, strict=True)) % 2**64


def test_it_is_the_weighted_sum_modulo_two_to_the_64() -> None:
    words = blocks(3)
    weights = module._weights(24, torch.device("cpu")).tolist()
    expected = [[plain_sum(head, weights) for head in block] for block in words.tolist()]
    assert block_sums(words).tolist() == expected


def test_weights_are_odd_and_distinct() -> None:
    """Odd: any one changed word changes the sum. Distinct: so do two exchanged words."""
    weights = module._weights(4096, torch.device("cpu"))
    assert bool((weights & 1).all())
    assert len(set(weights.tolist())) == 4096


def test_it_never_changes_silently() -> None:
    """Workers of different versions check each other's digests."""
    words = torch.arange(2 * 3 * 4, dtype=torch.int32).view(2, 3, 4)
    assert digest_rows(words, [5, 6], [1, 2]) == GOLDEN


@given(
    word=st.integers(0, 23),
    head=st.integers(0, 1),
    block=st.integers(0, 2),
    bit=st.integers(0, 31),
)
def test_any_flipped_bit_changes_its_head_and_no_other(
    word: int, head: int, block: int, bit: int
) -> None:
    words = blocks(3)
    before = block_sums(words)
    words[block, head, word] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)
    changed = block_sums(words) != before
    assert changed[block, head] and changed.sum() == 1


def test_every_bit_of_a_small_block() -> None:
    words = blocks(1, num_heads=1, num_words=6)
    flipped = torch.cat(
        [
            words ^ (torch.arange(6) == word).to(torch.int32) * bit
            for word in range(6)
            for bit in BITS
        ]
    )
    sums = block_sums(flipped)
    assert (sums != block_sums(words)).all()
    assert len(np.unique(sums)) == len(flipped)


def test_swapped_moved_and_stale_blocks_differ_where_their_bytes_agree() -> None:
    words = blocks(1)
    here = digest_rows(words, [3], [7])
    assert digest_rows(words, [4], [7]) != here, "moved"
    assert digest_rows(words, [3], [8]) != here, "of another time"
    assert digest_rows(words, [3], [7], "f" * 32) != here, "of another pool"
    assert digest_rows(words.flip(1), [3], [7]) != here, "heads exchanged"
    assert digest_rows(words, [7], [3]) != here, "block id and generation exchanged"


def test_seeds_of_a_pool_are_all_different() -> None:
    block_ids = [block_id for block_id in range(64) for _ in range(64)]
    generations = [generation for _ in range(64) for generation in range(64)]
    seed = seeds(INCARNATION, block_ids, generations, 8)
    assert len(np.unique(seed)) == seed.size


def test_two_exchanged_words_differ() -> None:
    words = blocks(1)
    exchanged = words.clone()
    exchanged[..., [2, 9]] = words[..., [9, 2]]
    assert (block_sums(exchanged) != block_sums(words)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_reads_bytes_whatever_they_mean(dtype: torch.dtype) -> None:
    """Also of values that compare equal, or unequal to themselves."""
    values = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    values[0, 0, 0], values[1, 1, 1] = 0.0, float("nan")
    before = block_sums(values.view(torch.int32))
    assert (block_sums(values.clone().view(torch.int32)) == before).all()
    values[0, 0, 0] = -0.0
    assert (block_sums(values.view(torch.int32)) != before).tolist() == [
        [True, False],
        [False, False],
    ]


@pytest.mark.parametrize("words_at_once", [1, 48, 49, 100, 1 << 20])
def test_summing_in_parts_gives_the_same(
    words_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = block_sums(blocks(5)).tolist()
    monkeypatch.setattr(module, "_WORDS_AT_ONCE", words_at_once)
    assert block_sums(blocks(5)).tolist() == whole


def test_a_block_is_summed_alike_alone_and_among_others() -> None:
    words = blocks(5)
    alone = np.concatenate([block_sums(words[i : i + 1]) for i in range(5)])
    assert (block_sums(words) == alone).all()


def test_a_view_that_is_not_contiguous_is_summed_alike() -> None:
    words = blocks(6)
    assert (block_sums(words[::2]) == block_sums(words[::2].contiguous())).all()


def test_no_blocks_have_no_digests() -> None:
    assert digest_rows(blocks(0), [], []) == []
    assert block_sums(blocks(0)).shape == (0, 2)


def test_extreme_words_wrap_around() -> None:
    words = torch.full((1, 1, 4096), -(2**31), dtype=torch.int32)
    weights = module._weights(4096, torch.device("cpu")).tolist()
    assert block_sums(words).tolist() == [[plain_sum([-(2**31)] * 4096, weights)]]
