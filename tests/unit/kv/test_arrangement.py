"""Arrangement: one pool for all cache groups or a pool each, whichever wastes less."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.shared.kv.arrangement import Arrangement, arrange, most_blocks
from baton.shared.kv.cache_spec import (
    CacheGroup,
    CacheSpec,
    Full,
    Sliding,
    State,
    StateTensor,
    cache_groups,
    places_of_layers,
)

BLOCK_SIZE, ITEMSIZE, AHEAD = 16, 2, 512
MOST_GROUPS, GROUP_COST = 8, 0.005
"""A group more costs host time in every step: it must save so much of the memory."""

LLAMA: list[CacheSpec] = [Full(8, 128)] * 32
MISTRAL: list[CacheSpec] = [Sliding(8, 128, 4096)] * 32
GPT_OSS: list[CacheSpec] = [Sliding(8, 64, 128), Full(8, 64)] * 18
_LOCAL_3: list[CacheSpec] = [Sliding(4, 256, 1024)]
GEMMA_3 = [*_LOCAL_3 * 5, Full(4, 256)] * 5 + _LOCAL_3 * 4
_LOCAL_4: list[CacheSpec] = [Sliding(16, 256, 1024)]
GEMMA_4 = [*_LOCAL_4 * 5, Full(4, 512)] * 10
UNEVEN: list[CacheSpec] = [Full(3, 64), *[Sliding(5, 96, 700)] * 2, Full(1, 128)]

SHAPES: dict[str, list[CacheSpec]] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "gpt-oss": GPT_OSS,
    "gemma 3": GEMMA_3,
    "gemma 4": GEMMA_4,
    "uneven": UNEVEN,
}


def arranged(specs: Sequence[CacheSpec], max_model_len: int = 32_768) -> Arrangement:
    return arrange(
        specs,
        block_size=BLOCK_SIZE,
        itemsize=ITEMSIZE,
        max_model_len=max_model_len,
        ahead_tokens=AHEAD,
    )


def held(group: CacheGroup, num_tokens: int) -> int:
    """Blocks of a group that a sequence of so many tokens holds at most."""
    whole = -(-num_tokens // BLOCK_SIZE)
    most = most_blocks(group, BLOCK_SIZE, AHEAD)
    return whole if most is None else min(whole, most)


def lengths(max_model_len: int) -> list[int]:
    found = [max_model_len]
    while found[-1] // 2 >= 256:
        found.append(found[-1] // 2)
    return found


def waste_apart(groups: Sequence[CacheGroup], max_model_len: int) -> float:
    """With pools cut for the longest sequences: what is idle of a memory of 1 when one is full."""

    def need(num_tokens: int) -> list[int]:
        return [held(each, num_tokens) * each.block_bytes(BLOCK_SIZE, ITEMSIZE) for each in groups]

    longest = need(max_model_len)
    idle = []
    for num_tokens in lengths(max_model_len):
        needs = need(num_tokens)
        num_sequences = min(
            size / sum(longest) / wanted for size, wanted in zip(longest, needs, strict=True)
        )
        idle.append(1 - num_sequences * sum(needs))
    return sum(idle) / len(idle)


def waste_together(groups: Sequence[CacheGroup], max_model_len: int) -> float:
    """In one pool: what is padding."""
    wasted = []
    for num_tokens in lengths(max_model_len):
        counts = [held(each, num_tokens) for each in groups]
        used = [
            count * len(each.layer_ids) / (len(each.layer_ids) + each.num_padding_layers)
            for count, each in zip(counts, groups, strict=True)
        ]
        wasted.append(1 - sum(used) / sum(counts))
    return sum(wasted) / len(wasted)


def ways_together(specs: Sequence[CacheSpec]) -> Iterator[list[CacheGroup]]:
    """Every way to cut equal layers into groups and to pad these so that blocks are equally large,
    but for those whose blocks are larger than all layers of a kind need."""
    plain = cache_groups(specs)
    most = max(each.block_bytes(BLOCK_SIZE, ITEMSIZE) for each in plain)
    one_layer = [CacheGroup(each.spec, (0,)).block_bytes(BLOCK_SIZE, ITEMSIZE) for each in plain]
    for num_in_first in range(1, 2 * most // one_layer[0] + 1):
        size = num_in_first * one_layer[0]
        if any(size % each for each in one_layer):
            continue
        groups = []
        for each, bytes_of_layer in zip(plain, one_layer, strict=True):
            fit = size // bytes_of_layer
            for start in range(0, len(each.layer_ids), fit):
                part = each.layer_ids[start : start + fit]
                groups.append(CacheGroup(each.spec, part, fit - len(part)))
        if len(groups) <= MOST_GROUPS:
            yield groups


def check(specs: Sequence[CacheSpec], found: Arrangement) -> None:
    places = places_of_layers(found.groups)
    assert sorted(places) == list(range(len(specs))), "each layer has one place"
    assert len(set(places.values())) == len(specs)
    for layer, (group, place) in places.items():
        assert found.groups[group].spec == specs[layer]
        assert found.groups[group].layer_ids[place] == layer
    for each, pool in zip(found.groups, found.pools, strict=True):
        assert each.block_bytes(BLOCK_SIZE, ITEMSIZE) == found.block_bytes[pool]
    assert set(found.pools) == set(range(found.num_pools))


def check_waste(specs: Sequence[CacheSpec], found: Arrangement, max_model_len: int) -> None:
    """It is what it says, and none of the alternatives is worth more."""
    measure = waste_together if found.num_pools == 1 else waste_apart
    assert found.waste == pytest.approx(measure(found.groups, max_model_len), abs=1e-9)
    plain = cache_groups(specs)
    assert found.waste <= waste_apart(plain, max_model_len) + 1e-9
    for groups in ways_together(specs):
        saved = found.waste - waste_together(groups, max_model_len)
        assert saved <= GROUP_COST * (len(groups) - len(found.groups)) + 1e-9


@pytest.mark.parametrize("max_model_len", [100, 2048, 32_768, 131_072])
@pytest.mark.parametrize("shape", SHAPES)
def test_models_of_the_field(shape: str, max_model_len: int) -> None:
    specs = SHAPES[shape]
    found = arranged(specs, max_model_len)
    check(specs, found)
    check_waste(specs, found, max_model_len)


@pytest.mark.parametrize(
    ("shape", "num_groups", "num_pools"),
    [("llama", 1, 1), ("mistral", 1, 1), ("gpt-oss", 2, 1), ("gemma 3", 7, 1)],
)
def test_what_is_equally_large_shares_a_pool(shape: str, num_groups: int, num_pools: int) -> None:
    found = arranged(SHAPES[shape])
    assert (len(found.groups), found.num_pools) == (num_groups, num_pools)
    assert found.waste < 0.03


specs_of_layers = st.lists(
    st.sampled_from([Full(2, 8), Full(4, 8), Full(3, 8), Sliding(2, 8, 64), Sliding(1, 24, 5000)]),
    min_size=1,
    max_size=16,
)


@settings(max_examples=60)
@given(specs=specs_of_layers, max_model_len=st.integers(1, 20_000))
def test_any_layers(specs: list[CacheSpec], max_model_len: int) -> None:
    found = arranged(specs, max_model_len)
    check(specs, found)
    check_waste(specs, found, max_model_len)


@given(
    window=st.integers(1, 200),
    block_size=st.sampled_from([1, 4, 16]),
    ahead=st.integers(1, 100),
    position=st.integers(0, 500),
)
def test_a_window_needs_no_more_blocks_wherever_it_begins(
    window: int, block_size: int, ahead: int, position: int
) -> None:
    """All that tokens from `position` on read while `ahead` of them are computed."""
    group = CacheGroup(Sliding(1, 8, window), (0,))
    first = max(0, position - window + 1) // block_size
    last = (position + ahead - 1) // block_size
    most = most_blocks(group, block_size, ahead)
    assert most is not None and last - first + 1 <= most
    # Where it begins at the end of a block, it needs them all.
    start = 100 * block_size - 1
    last = (start + window - 1 + ahead - 1) // block_size
    assert last - start // block_size + 1 == most
    assert most_blocks(CacheGroup(Full(1, 8), (0,)), block_size, ahead) is None


def test_the_log_says_what_it_wastes() -> None:
    assert arranged(LLAMA).describe() == "one cache group"
    assert arranged(GPT_OSS).describe() == "2 cache groups share one pool, 0.0% wasted"


# States

GDN = State(
    16,
    (StateTensor("recurrent", (2, 128, 128), "float32"), StateTensor("conv", (512, 3), "bfloat16")),
)
"""Of a layer of Qwen3.5-35B-A3B; three of them come before a full one."""
QWEN_3_5: list[CacheSpec] = [*[GDN] * 3, Full(2, 256)] * 10


def test_states_have_slots_of_their_own_behind_all_others() -> None:
    found = arranged(QWEN_3_5)
    full, states = found.groups
    assert full.layer_ids == tuple(range(3, 40, 4)) and states.spec == GDN
    assert (found.pools, found.slot_pools, found.waste) == ((0, 1), [1], 0.0)
    # 30 layers of 2 MiB, and 48 KiB of the convolution's.
    assert found.block_bytes[1] == states.constant_bytes == 30 * (2 * 2**20 + 48 * 2**10)
    assert found.describe() == "one cache group, states of 64389120 bytes for each sequence"
    alone = arranged([GDN] * 4)
    assert (alone.pools, alone.slot_pools, alone.num_pools) == ((0,), [0], 1)
    assert alone.describe() == "states of 8585216 bytes for each sequence"


@settings(max_examples=30)
@given(specs=specs_of_layers, states=st.lists(st.integers(0, 16), min_size=1, max_size=5))
def test_states_change_nothing_for_the_others(specs: list[CacheSpec], states: list[int]) -> None:
    other = State(1, GDN.tensors)
    without, mixed = arranged(specs, 2048), list(specs)
    for number, place in enumerate(states):
        mixed.insert(place, GDN if number % 2 else other)
    found = arranged(mixed, 2048)
    growing = [each for each in found.groups if each.spec.grows]
    assert [(g.spec, len(g.layer_ids), g.num_padding_layers) for g in growing] == [
        (g.spec, len(g.layer_ids), g.num_padding_layers) for g in without.groups
    ]
    kinds = len({number % 2 for number in range(len(states))})
    first = without.num_pools
    assert found.pools == (*without.pools, *range(first, first + kinds))
    assert found.slot_pools == list(range(first, first + kinds))
    assert (found.waste, found.block_bytes[:first]) == (without.waste, without.block_bytes)
    places = places_of_layers(found.groups)
    of_layers = [found.groups[places[layer][0]].spec for layer in range(len(mixed))]
    assert of_layers == mixed and len(places) == len(mixed)
    shares = found.shares(BLOCK_SIZE, AHEAD)
    assert [share.max_blocks for share in shares[len(growing) :]] == [1] * kinds
