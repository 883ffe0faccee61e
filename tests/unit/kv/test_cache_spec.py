"""CacheSpec: what a token reads, how layers become groups, how heads are shared out to ranks."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.shared.kv.cache_spec import (
    CacheGroup,
    CacheSpec,
    Full,
    Latent,
    Sliding,
    State,
    StateTensor,
    cache_groups,
    places_of_layers,
    window_of,
)

FULL, NARROW, WIDE = Full(2, 8), Sliding(2, 8, 4), Sliding(2, 8, 100)
STATE = State(
    4, (StateTensor("recurrent", (16, 3), "float32"), StateTensor("conv", (5,), "bfloat16"))
)
LATENT = Latent(512, 64)
MOST_TOKENS = 60


def reads(spec: CacheSpec, position: int) -> list[int]:
    """By a mask as transformers makes it: causal, and closer than the window."""
    window = window_of(spec)
    return [
        key
        for key in range(MOST_TOKENS)
        if key <= position and (window is None or position - key < window)
    ]


@given(
    spec=st.sampled_from([FULL, LATENT, Sliding(1, 8, 1), NARROW, WIDE]),
    position=st.integers(0, MOST_TOKENS - 1),
    block_size=st.sampled_from([1, 4, 16]),
)
def test_the_first_token_and_block_that_are_read(
    spec: CacheSpec, position: int, block_size: int
) -> None:
    expected = reads(spec, position)
    assert spec.first_read(position) == expected[0]
    first_block = CacheGroup(spec, (0,)).first_block(position, block_size)
    assert first_block == min(key // block_size for key in expected)


def test_who_reads_everything() -> None:
    assert FULL.reads_everything and not WIDE.reads_everything
    assert (window_of(FULL), window_of(WIDE)) == (None, 100)


@given(num_heads=st.integers(1, 16), num_ranks=st.integers(1, 16), is_sliding=st.booleans())
def test_ranks_cover_every_head_exactly(num_heads: int, num_ranks: int, is_sliding: bool) -> None:
    """Each head at one rank; where there are more ranks than heads, each at equally many."""
    spec = Sliding(num_heads, 8, 5) if is_sliding else Full(num_heads, 8)
    if num_heads % num_ranks and num_ranks % num_heads:
        for rank in range(num_ranks):
            for ask in (spec.heads_of_rank, spec.of_rank):
                with pytest.raises(ValueError, match=f"{num_heads} KV heads .* {num_ranks} ranks"):
                    ask(rank, num_ranks)
        return
    shares = [spec.heads_of_rank(rank, num_ranks) for rank in range(num_ranks)]
    held = Counter(head for share in shares for head in share)
    assert held == dict.fromkeys(range(num_heads), max(1, num_ranks // num_heads))
    firsts = [share.start for share in shares]
    assert firsts == sorted(firsts), "in order"
    for rank, share in enumerate(shares):
        of_rank = spec.of_rank(rank, num_ranks)
        assert type(of_rank) is type(spec) and window_of(of_rank) == window_of(spec)
        assert (of_rank.num_kv_heads, of_rank.head_dim) == (len(share), 8)


def test_latents_are_the_same_at_every_rank() -> None:
    """One head of 576 numbers a token and layer: 70,272 bytes a token of deepseek_v3's 61."""
    assert CacheGroup(LATENT, tuple(range(61))).block_bytes(16, 2) == 16 * 70_272
    for rank in range(8):
        assert LATENT.of_rank(rank, 8) == LATENT
        assert LATENT.heads_of_rank(rank, 8) == range(1)


layers = st.lists(st.sampled_from([FULL, NARROW, WIDE, Full(1, 16)]), min_size=1, max_size=12)


@given(specs=layers)
def test_layers_with_equal_specs_are_a_group_and_each_has_one_place(
    specs: list[CacheSpec],
) -> None:
    groups = cache_groups(specs)
    assert [group.spec for group in groups] == list(dict.fromkeys(specs))
    places = places_of_layers(groups)
    assert sorted(places) == list(range(len(specs)))
    assert len(set(places.values())) == len(specs)
    for layer, (number, place) in places.items():
        assert groups[number].spec == specs[layer]
        assert groups[number].layer_ids[place] == layer
    assert all(list(group.layer_ids) == sorted(group.layer_ids) for group in groups)


def test_a_block_is_its_axes() -> None:
    group = CacheGroup(WIDE, (1, 3, 5), num_padding_layers=1)
    assert list(group.axes(16)) == ["kv_head", "layer", "kv", "token", "dim"]
    assert group.block_shape(16) == (2, 4, 2, 16, 8)
    assert group.block_bytes(16, 2) == 2 * 4 * 2 * 16 * 8 * 2


# States


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 32_768])
def test_a_state_takes_one_slot_for_good(num_tokens: int) -> None:
    group = CacheGroup(STATE, (0, 2))
    assert group.num_blocks_for(num_tokens, 16) == 1
    assert group.first_block(num_tokens, 16) == 0, "what a token reads is never given back"
    assert CacheGroup(FULL, (0,)).num_blocks_for(num_tokens, 16) == -(-num_tokens // 16)


def test_a_slot_is_as_large_whatever_the_block_size_and_the_dtype_of_caches() -> None:
    group = CacheGroup(STATE, (0, 2))
    # Of a head in a layer: 16 · 3 numbers of 4 bytes, and 5 of 2, which are rounded up to 16 bytes.
    assert STATE.offsets_bytes() == (0, 192, 208)
    assert group.block_bytes(16, 2) == group.block_bytes(1, 4) == 4 * 2 * 208
    assert group.constant_bytes == 4 * 2 * 208 and CacheGroup(FULL, (0,)).constant_bytes == 0
    assert group.block_shape(16) == (2, 4, 208)


@pytest.mark.parametrize(
    ("num_heads", "shape", "num_pieces"),
    [
        # Qwen3.5-35B-A3B: 30 layers of 2 MiB, and what a convolution keeps.
        (32, (128, 128), 30 * 1),
        (32, (132, 128), 30 * 2),
        # Mamba2-2.7B, whose heads all belong to one group: 2.5 MiB a layer.
        (1, (80, 64, 128), 30 * 2),
        (7, (3, 5), 30 * 1),
        (7, (1 << 17,), 30 * 7),
        (6, (1 << 20,), 30 * 6 * 2),
    ],
)
def test_a_slot_is_cut_into_pieces_of_2_mib_at_most(
    num_heads: int, shape: tuple[int, ...], num_pieces: int
) -> None:
    """Each of whole heads of one layer, or a part of one."""
    group = CacheGroup(State(num_heads, (StateTensor("sum", shape, "float32"),)), tuple(range(30)))
    assert group.num_pieces == num_pieces
    assert group.constant_bytes % num_pieces == 0
    assert group.constant_bytes // num_pieces <= 2 << 20
    assert CacheGroup(WIDE, (0, 1)).num_pieces == WIDE.num_kv_heads


def test_nothing_before_the_last_token_is_left_of_a_state() -> None:
    assert not STATE.grows and not STATE.reads_everything
    assert [STATE.first_read(position) for position in (0, 1, 2, 100)] == [0, 0, 1, 99]


def test_ranks_share_a_state_by_heads() -> None:
    assert STATE.of_rank(1, 2) == State(2, STATE.tensors)
    assert STATE.heads_of_rank(1, 2) == range(2, 4)
    with pytest.raises(ValueError, match="4 KV heads .* 3 ranks"):
        STATE.of_rank(0, 3)


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (("sum", (8,), "float64"), "sum: dtype float64 is not one of float32, bfloat16, float16"),
        (("sum", (), "float32"), "holds nothing"),
        (("sum", (8, 0), "float32"), "holds nothing"),
    ],
)
def test_tensors_that_cannot_be(tensor: tuple[str, tuple[int, ...], str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        StateTensor(*tensor)


def test_each_tensor_has_a_name_of_its_own() -> None:
    for tensors in ((), (STATE.tensors[0], STATE.tensors[0])):
        with pytest.raises(ValueError, match="name of its own"):
            State(2, tensors)
