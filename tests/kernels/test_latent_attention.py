"""Latent attention and its store against float64, at awkward shapes, over a pool full of NaN."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from baton.kernels.decode_plan import make_work, plan_decode
from baton.kernels.latent_attention import (
    latent_chunk_attention,
    latent_decode_attention,
    latent_decode_config,
)
from baton.kernels.latent_expand import (
    STRETCH_TOKENS,
    expand_latents,
    expand_stretches,
    expands,
    why_never_expanded,
)
from baton.kernels.latent_heads import covers, store_and_absorb
from baton.kernels.latent_store import rope_and_store_latent
from baton.kernels.prefill_attention import prefill_tiles
from baton.kernels.reference_latent import LatentHeads
from baton.shared.engine import device_latents
from baton.shared.engine.device_columns import Chunk
from baton.shared.engine.device_plan import DevicePlan, Expansion

Check = Callable[[Tensor, Tensor], None]
Poisoned = Callable[..., Tensor]
LAYERS, LAYER = 3, 1
NOBODY = 0x7EADBEEF
SHAPES = {
    "odd": (5, 24, 6, 4),
    "many heads, aligned": (66, 32, 16, 32),
    "one head, blocks of one": (1, 33, 8, 1),
}
"""Heads, rank, what turns, tokens of a block."""
if torch.cuda.is_available():
    # Too large for the interpreter; 40 and 128 heads have a kernel of their own on Hopper.
    SHAPES |= {
        f"deepseek, {heads} heads, blocks of {size}": (heads, 512, 64, size)
        for heads, size in ((16, 16), (40, 64), (128, 16), (128, 32))
    }


class Cache:
    """Rows of latents in shuffled blocks; what must not be used is NaN or an impossible id."""

    def __init__(
        self, lengths: list[int], rank: int, rope: int, size: int, dtype: torch.dtype, device: str
    ) -> None:
        num_slots = len(lengths) + 2
        self.slots = torch.randperm(num_slots)[: len(lengths)].tolist()
        width = max(-(-length // size) for length in lengths) + 1
        tables = torch.full((num_slots, width), NOBODY, dtype=torch.int32)
        lens = torch.full((num_slots,), NOBODY, dtype=torch.int32)
        free = torch.randperm(sum(-(-length // size) for length in lengths) + 2).tolist()
        kv = torch.full((len(free) + 1, 1, LAYERS, 1, size, rank + rope), torch.nan, dtype=dtype)
        self.latents = []
        for slot, length in zip(self.slots, lengths, strict=True):
            own = torch.randn(length, rank + rope).to(dtype)
            for first in range(0, length, size):
                tables[slot, first // size] = free.pop()
                part = own[first : first + size]
                kv[tables[slot, first // size], 0, LAYER, 0, : len(part)] = part
            lens[slot] = length
            self.latents.append(own.double())
        self.kv, self.tables, self.lens = (each.to(device) for each in (kv, tables, lens))


def attended(query: Tensor, latents: Tensor, rank: int, scale: float) -> Tensor:
    """query [heads, rank + rope] over latents [keys, rank + rope] → [heads, rank], in float64."""
    weights = (query.double() @ latents.T * scale).softmax(-1)
    return weights @ latents[:, :rank]


@pytest.mark.parametrize("shape", SHAPES)
def test_decode(
    shape: str,
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Check,
    poisoned: Poisoned,
) -> None:
    heads, rank, rope, size = SHAPES[shape]
    if dtype == torch.float32:
        heads = min(heads, 20)
    like = torch.empty(2, 1, 1, 1, size, rank + rope, dtype=dtype, device=device)
    config = latent_decode_config(5, heads, like)
    # So that the longest is split.
    lengths = [1, 3 * config.block_n + 6, 33, 2]
    cache = Cache(lengths, rank, rope, size, dtype, str(device))
    rows = torch.tensor([*cache.slots[:2], -1, *cache.slots[2:]], dtype=torch.int32, device=device)
    work = make_work(len(rows), 1, heads, rank, device, config=config, num_items=9)
    work.partial.fill_(torch.nan)
    plan_decode(rows, cache.lens, work)
    # Views into wider rows, as products give them.
    query = torch.randn(heads, len(rows), rank).to(dtype).to(device).transpose(0, 1)
    turned = torch.randn(len(rows), heads, 7 + rope).to(dtype).to(device)[..., 7:]
    out = poisoned(len(rows), heads, rank, dtype=dtype)
    latent_decode_attention(query, turned, cache.kv, LAYER, rows, cache.tables, work, 0.3, out=out)
    assert bool((out[2] == 0).all()), "padding becomes zero"
    assert int(work.row_items[:, 1].max()) > 1, "a row was split"
    whole = torch.cat((query, turned), -1).cpu()
    for row, latents in zip((0, 1, 3, 4), cache.latents, strict=True):
        assert_close(out[row], attended(whole[row], latents, rank, 0.3))


@pytest.mark.parametrize("num_rows", [2, 4, 5, 33])
def test_decode_with_what_is_around_it(
    num_rows: int,
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Check,
    poisoned: Poisoned,
) -> None:
    """Queries absorbed and what heads make of it, in both ways of adding up."""
    heads, key_dim, value_dim, rank, rope, size = 3, 32, 64, 64, 6, 4
    like = torch.empty(2, 1, 1, 1, size, rank + rope, dtype=dtype, device=device)
    config = latent_decode_config(num_rows, heads, like)
    lengths = [3 * config.block_n + 6, *range(1, num_rows - 1)]
    cache = Cache(lengths, rank, rope, size, dtype, str(device))
    rows = torch.tensor([-1, *cache.slots], dtype=torch.int32, device=device)
    work = make_work(num_rows, 1, heads, rank, device, config=config, num_items=num_rows + 40)
    work.partial.fill_(torch.nan)
    plan_decode(rows, cache.lens, work)
    assert int(work.row_items[:, 1].max()) > 1, "a row was split"
    query = torch.randn(num_rows, 5 + heads * (key_dim + rope)).to(dtype).to(device)[:, 5:]
    query = query.view(num_rows, heads, key_dim + rope)
    before = query.clone()
    key = (torch.randn(heads, key_dim, rank) / 4).to(dtype).to(device)
    value = (torch.randn(heads, rank, value_dim) / 4).to(dtype).to(device)
    assert covers(key, value) and not covers(key[:, :, :33], value)
    angles = torch.rand(9, rope // 2, device=device) * 6
    positions = torch.arange(num_rows, dtype=torch.int32, device=device) % 9
    latent = torch.randn(num_rows, rank + rope).to(dtype).to(device)
    norm = torch.rand(rank).to(dtype).to(device)
    # Two tokens are stored, by the side of what is attended to.
    slots = torch.full((num_rows,), -1, device=device)
    slots[:2] = torch.tensor([7, 2], device=device)
    stored, expected = (
        torch.full((3, 1, LAYERS, 1, size, rank + rope), torch.nan, dtype=dtype, device=device)
        for _ in range(2)
    )
    own = (latent, norm, 1e-6, angles.cos(), angles.sin(), positions, slots)
    absorbed = store_and_absorb(query, *own, stored, LAYER, key)
    turned = query.clone()
    rope_and_store_latent(turned, *own, expected, LAYER)
    assert torch.equal(query, before)
    assert torch.equal(stored.nan_to_num(77.0), expected.nan_to_num(77.0))
    assert torch.equal(absorbed[..., rank:], turned[..., key_dim:])
    by_key = torch.einsum("thk,hkr->thr", before[..., :key_dim].double().cpu(), key.double().cpu())
    assert_close(absorbed[..., :rank], by_key)

    out = latent_decode_attention(
        absorbed[..., :rank],
        absorbed[..., rank:],
        cache.kv,
        LAYER,
        rows,
        cache.tables,
        work,
        0.1,
        value=value,
        out=poisoned(num_rows, heads, rank, dtype=dtype),
    )
    assert bool((out[0] == 0).all()), "padding becomes zero"
    for row, latents in enumerate(cache.latents, 1):
        sums = attended(absorbed[row].cpu(), latents, rank, 0.1)
        assert_close(out[row], torch.einsum("hr,hrv->hv", sums, value.double().cpu()))


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks(
    shape: str,
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Check,
    poisoned: Poisoned,
) -> None:
    heads, rank, rope, size = SHAPES[shape]
    if dtype == torch.float32:
        heads = min(heads, 20)
    lengths, counts = [34, 3], [5, 3]
    cache = Cache(lengths, rank, rope, size, dtype, str(device))
    starts = np.array([2, 7, 10])
    positions = np.array([length - n for length, n in zip(lengths, counts, strict=True)])
    tiles = prefill_tiles(starts, np.array(cache.slots), positions, block_m=4)
    tiles = np.concatenate((tiles, [[0, 0, 0, 0], [0, 3, -1, 0]]))
    query = torch.randn(heads, 12, rank).to(dtype).to(device).transpose(0, 1)
    turned = torch.randn(12, heads, rope).to(dtype).to(device)
    out = poisoned(12, heads, rank, dtype=dtype)
    latent_chunk_attention(
        query,
        turned,
        cache.kv,
        LAYER,
        torch.from_numpy(tiles.astype(np.int32)).to(device),
        cache.tables,
        0.3,
        block_m=4,
        out=out,
    )
    whole = torch.cat((query, turned), -1).cpu()
    for first, count, latents in zip(starts, counts, cache.latents, strict=False):
        for token in range(count):
            visible = latents[: len(latents) - count + token + 1]
            expected = attended(whole[first + token], visible, rank, 0.3)
            assert_close(out[first + token], expected)
    assert bool(out[:2].isnan().all() and out[10:].isnan().all()), "nothing else is written"


@pytest.mark.parametrize("shape", SHAPES)
def test_store(shape: str, dtype: torch.dtype, device: torch.device, assert_close: Check) -> None:
    heads, rank, rope, size = SHAPES[shape]
    key_dim, eps = 5, 1e-6
    positions = torch.tensor([7, 0, 3, 2], dtype=torch.int32, device=device)
    slots = torch.tensor([2 * size, 5 * size - 1, -1, 0], device=device)
    kv = torch.full((6, 1, LAYERS, 1, size, rank + rope), torch.nan, dtype=dtype, device=device)
    angles = torch.rand(9, rope // 2, device=device) * 6
    query = torch.randn(4, heads, key_dim + rope).to(dtype).to(device)
    wide = torch.randn(4, 3 + rank + rope).to(dtype).to(device)
    norm = torch.rand(rank).to(dtype).to(device)
    before = query.double().cpu()
    cos, sin = angles.cos(), angles.sin()
    rope_and_store_latent(query, wide[:, 3:], norm, eps, cos, sin, positions, slots, kv, LAYER)

    at = angles.double().cpu()[positions.cpu().long()]

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        c, s = at.cos(), at.sin()
        if x.dim() == 3:
            c, s = c[:, None], s[:, None]
        return torch.cat((first * c - second * s, second * c + first * s), -1)

    assert torch.equal(query[..., :key_dim].double().cpu(), before[..., :key_dim])
    assert_close(query[..., key_dim:], turned(before[..., key_dim:]))
    latent = wide[:, 3 : 3 + rank].double().cpu()
    latent = latent / (latent.square().mean(-1, keepdim=True) + eps).sqrt() * norm.double().cpu()
    kept = torch.cat((latent, turned(wide[:, 3 + rank :].double().cpu())), -1)
    stored = slots >= 0
    block, offset = slots[stored] // size, slots[stored] % size
    assert_close(kv[block, 0, LAYER, 0, offset], kept[stored.cpu()])
    kv[block, 0, LAYER, 0, offset] = torch.nan
    assert bool(kv.isnan().all()), "nothing else is written"


@pytest.mark.parametrize("shape", SHAPES)
def test_expansion(
    shape: str, dtype: torch.dtype, device: torch.device, assert_close: Check
) -> None:
    _, rank, rope, size = SHAPES[shape]
    rank = {24: 32, 33: 64}.get(rank, rank)  # whole tiles
    heads, key_dim, value_dim, length = 3, 9, 8, 37
    cache = Cache([5, length], rank, rope, size, dtype, str(device))
    key = torch.randn(heads, key_dim, rank).to(dtype).to(device)
    value = torch.randn(heads, rank, value_dim).to(dtype).to(device)
    slot = cache.slots[1]
    out = expand_latents(cache.kv, LAYER, cache.tables, slot, length, key, value).cpu()
    assert out.shape == (-(-length // size), heads, 1, 2, size, key_dim + rope)
    by_token = out[:, :, 0].permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, :length]
    latents = cache.latents[1]
    keys = torch.einsum("nr,hkr->hnk", latents[:, :rank], key.double().cpu())
    values = torch.einsum("nr,hrv->hnv", latents[:, :rank], value.double().cpu())
    turned = latents[:, rank:].expand(heads, -1, -1)
    assert_close(by_token[0], torch.cat((keys, turned), -1))
    assert_close(by_token[1][..., :value_dim], values)
    assert bool((by_token[1][..., value_dim:] == 0).all())


def test_expansion_of_stretches(dtype: torch.dtype, device: torch.device) -> None:
    """Of several rows, some longer than a stretch; places without keys are passed over."""
    heads, key_dim, value_dim, rank, rope, size = 2, 9, 8, 32, 6, 4
    num_tokens = 2 * STRETCH_TOKENS
    cache = Cache([5, 258, 37], rank, rope, size, dtype, str(device))
    key = torch.randn(heads, key_dim, rank).to(dtype).to(device)
    value = torch.randn(heads, rank, value_dim).to(dtype).to(device)
    rows = [(2, 0, 37), (1, 0, 258), (1, 256, 258)]
    stretches = [(cache.slots[row], first, end) for row, first, end in rows]
    out = expand_stretches(
        cache.kv,
        LAYER,
        cache.tables,
        torch.tensor([*stretches, (0, 0, 0)], dtype=torch.int32, device=device),
        num_tokens,
        key,
        value,
    )
    assert out.shape == (4 * num_tokens // size, heads, 1, 2, size, key_dim + rope)
    whole = out[:, :, 0].permute(2, 1, 0, 3, 4).flatten(2, 3)
    for number, (row, first, end) in enumerate(rows):
        alone = expand_latents(cache.kv, LAYER, cache.tables, cache.slots[row], end, key, value)
        expected = alone[:, :, 0].permute(2, 1, 0, 3, 4).flatten(2, 3)
        count = min(end - first, num_tokens)
        own = whole[:, :, number * num_tokens :][:, :, :count]
        assert torch.equal(own, expected[:, :, first : first + count])


def test_which_form_is_cheaper() -> None:
    """deepseek_v3's sizes: whole prompts and long chunks are expanded, few tokens are not, least of
    all behind a long prefix; nor what there is no room for, or no kernel. Of few heads always."""
    sizes = {"num_heads": 128, "rank": 512, "rope_dim": 64, "itemsize": 2}
    sizes |= {"key_dim": 128, "value_dim": 128}
    assert not expands(16, 16, **sizes) and not expands(64, 64, **sizes)
    assert expands(2048, 2048, **sizes) and expands(8192, 8192, **sizes)
    few = {**sizes, "num_heads": 16}
    assert expands(1, 1, **few) and expands(16, 16_400, **few) and expands(4096, 20_480, **few)
    assert expands(2048, 16384, **sizes) and not expands(32, 8192, **sizes)
    assert not expands(2048, 60_000, **sizes)
    assert not expands(512, 512, **{**sizes, "value_dim": 256, "key_dim": 64})
    assert not expands(512, 512, **{**sizes, "key_dim": 300})


def test_what_is_never_expanded_is_named() -> None:
    assert why_never_expanded(512, 64, 192, 256) is None, "glm4_moe_lite's"
    assert "latents have 38 numbers" in str(why_never_expanded(38, 6, 14, 13))
    assert "heads make keys of 300 numbers" in str(why_never_expanded(512, 64, 300, 128))
    assert "heads make values of 300 numbers" in str(why_never_expanded(512, 64, 256, 300))
    assert "values have 256 numbers" in str(why_never_expanded(512, 64, 64, 256))
    assert "no multiple of 8" in str(why_never_expanded(512, 64, 128, 60))


def test_sizes_that_are_not_taken_are_named(device: torch.device) -> None:
    query = torch.zeros(1, 2, 520, device=device)
    turned = torch.zeros(1, 2, 8, device=device)
    kv = torch.zeros(2, 1, 1, 1, 16, 528, device=device)
    rows = torch.zeros(1, dtype=torch.int32, device=device)
    work = make_work(1, 1, 2, 520, device)
    with pytest.raises(ValueError, match="latents have 520 numbers, and the kernels take 512"):
        latent_decode_attention(query, turned, kv, 0, rows, rows[None], work, 1.0)


@pytest.mark.parametrize("form", ["expand_latents", "expand_stretches"])
def test_keys_and_values_of_some_heads_are_gone_before_those_of_the_next(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may take 256 MiB, and what a step takes is measured and reckoned without them twice."""
    made: list[weakref.ref[Tensor]] = []

    def expand(*_: object) -> Tensor:
        assert all(each() is None for each in made)
        keys = torch.zeros(1)
        made.append(weakref.ref(keys))
        return keys

    monkeypatch.setattr(device_latents, form, expand)
    attend = partial(torch.zeros, 4, 16, 8)
    monkeypatch.setattr(device_latents, "paged_prefill_attention", lambda *_, **__: attend())
    query, out, none = torch.zeros(4, 48, 8), torch.zeros(4, 48, 8), torch.zeros(1, 4).int()
    heads = LatentHeads(torch.zeros(48, 4, 8), torch.zeros(48, 8, 8))
    plan = DevicePlan(
        none, none, none, rows=None, work=None, tiles=none, block_m=16, counting=none[0]
    )
    if form == "expand_latents":
        chunk = Chunk(first_token=0, num_tokens=4, num_keys=4, slot=0, tiles=slice(0, 1))
        device_latents.attend_expanded(query, none, 0, plan, chunk, heads, 1.0, out)
    else:
        expansion = Expansion(none, 128, none, {})
        device_latents.attend_all_expanded(query, none, 0, plan, expansion, heads, 1.0, out)
    assert len(made) == 3
