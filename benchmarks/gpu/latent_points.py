"""The points of kernel_points.py about latent attention: deepseek's sizes, 16 heads as of V2-Lite
and 128 as of V3."""

# A point is measured before the next one is made, so functions may refer to loop variables.
# ruff: noqa: B023

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.gpu_timing import Call, Point, num_sets_for

RANK, ROPE_DIM, KEY_DIM, VALUE_DIM = 512, 64, 128, 128
HEADS = (16, 128)
SCALE = (KEY_DIM + ROPE_DIM) ** -0.5
BLOCK_SIZE = 16
_BF16 = torch.bfloat16


def latent_decode() -> Iterator[Point]:
    """The absorbed form: attention alone, without the products of heads around it; launched as
    decode steps do, so that it starts while the call before ends. Of some batches other tiles and
    splits too, so that the next table can be chosen."""
    from baton.kernels.decode_plan import make_work, plan_decode
    from baton.kernels.latent_attention import latent_decode_attention, latent_decode_config

    device = torch.device("cuda")
    for num_heads in HEADS:
        for batch, context in ((32, 8192), (1, 8192), (1, 1024), (32, 1024), (128, 1024)):
            kv, tables, num_bytes = _pool([context] * batch)
            query = torch.randn(batch, num_heads, RANK + ROPE_DIM, dtype=_BF16, device=device)
            rows = torch.arange(batch, dtype=torch.int32, device=device)
            context_lens = torch.full((batch,), context, dtype=torch.int32, device=device)
            out = torch.empty(batch, num_heads, RANK, dtype=_BF16, device=device)
            chosen = latent_decode_config(batch, num_heads, kv)
            others = _OTHERS.get((num_heads, batch, context), [])
            tried = [chosen] + [
                replace(chosen, block_n=n, num_warps=warps, num_stages=stages, programs=programs)
                for n, warps, stages, programs in others
            ]
            for config in tried:
                work = make_work(batch, 1, num_heads, RANK, device, config=config)
                plan_decode(rows, context_lens, work)

                def attend(i: int) -> None:
                    latent_decode_attention(
                        query[..., :RANK],
                        query[..., RANK:],
                        kv,
                        i,
                        rows,
                        tables,
                        work,
                        SCALE,
                        out=out,
                        pdl=True,
                    )

                note = f"{config.block_n} keys, {config.num_warps} warps, "
                note += f"{config.num_stages} stages, {config.programs} programs"
                yield Point(
                    f"{num_heads} heads {batch}×{context}",
                    attend,
                    num_bytes=num_bytes + 2 * batch * num_heads * (2 * RANK + ROPE_DIM),
                    flop=2.0 * num_heads * (2 * RANK + ROPE_DIM) * batch * context,
                    num_sets=kv.shape[2],
                    note=note,
                )


_OTHERS = {
    (16, 32, 8192): [
        (32, 4, 4, 256), (64, 8, 3, 128), (64, 4, 3, 128), (32, 8, 4, 128), (64, 4, 2, 256),
    ],
    (16, 1, 8192): [(32, 4, 3, each) for each in (16, 32, 128, 256)],
    (16, 1, 1024): [(32, 4, 3, 16), (16, 4, 3, 64)],
    (128, 32, 8192): [(64, 8, 2, 128), (64, 8, 2, 32)],
}  # fmt: skip
"""Keys of a tile, warps, stages, programs: beside those that are chosen. Of 128 heads, tiles of 64
go to the kernel for Hopper, others to that in Triton."""


def latent_heads() -> Iterator[Point]:
    """What is around it in a decode step: queries absorbed and latents stored, and values made of
    what was attended to; and what the library needs for the products alone."""
    from baton.kernels.latent_heads import MOST_ROWS, of_latents, store_and_absorb

    device = torch.device("cuda")
    angles = torch.rand(64, ROPE_DIM // 2, device=device)
    norm = torch.rand(RANK, dtype=_BF16, device=device)
    for num_heads in HEADS:
        for batch in (1, 32, MOST_ROWS):
            query = torch.randn(batch, num_heads, KEY_DIM + ROPE_DIM, dtype=_BF16, device=device)
            latent = torch.randn(batch, RANK + ROPE_DIM, dtype=_BF16, device=device)
            attended = torch.randn(batch, num_heads, RANK, dtype=_BF16, device=device)
            kv = torch.empty(
                batch, 1, 1, 1, BLOCK_SIZE, RANK + ROPE_DIM, dtype=_BF16, device=device
            )
            positions = torch.arange(batch, dtype=torch.int32, device=device)
            slots = positions.long()
            num_bytes = 4 * num_heads * RANK * KEY_DIM
            num_sets = num_sets_for(num_bytes)
            shape = (num_sets, num_heads, KEY_DIM, RANK)
            key = torch.randn(shape, dtype=_BF16, device=device)
            value = torch.randn(shape, dtype=_BF16, device=device).transpose(2, 3).contiguous()
            out = torch.empty(batch, num_heads, VALUE_DIM, dtype=_BF16, device=device)

            def both(i: int) -> None:
                store_and_absorb(
                    query, latent, norm, 1e-6, angles, angles, positions, slots, kv, 0, key[i],
                    pdl=True,
                )  # fmt: skip
                of_latents(attended, value[i], pdl=True)

            def library(i: int) -> None:
                torch.bmm(query[..., :KEY_DIM].transpose(0, 1), key[i])
                torch.bmm(attended.transpose(0, 1), value[i], out=out.transpose(0, 1))

            yield Point(
                f"{num_heads} heads {batch}",
                both,
                num_bytes=num_bytes,
                flop=4.0 * batch * num_heads * RANK * KEY_DIM,
                num_sets=num_sets,
                library={"bmm, no store": library},
            )


def latent_prefill() -> Iterator[Point]:
    """Both forms of a chunk behind a prefix, with all that each needs of a layer behind the store:
    the floor is that of the expanded one."""
    for num_heads in reversed(HEADS):
        for chunk, before in product((16, 64, 256, 1024, 4096), (0, 4096, 16384)):
            total = chunk + before
            kv, tables, _ = _pool([total])
            pairs = chunk * before + chunk * (chunk + 1) / 2
            flop = 2.0 * num_heads * (KEY_DIM + ROPE_DIM + VALUE_DIM) * pairs
            flop += 2.0 * num_heads * RANK * (KEY_DIM + VALUE_DIM) * total
            for form, call in _forms(num_heads, chunk, before, kv, tables).items():
                yield Point(
                    f"{num_heads} heads {chunk} over {before}",
                    call,
                    num_bytes=2 * (RANK + ROPE_DIM) * total,
                    flop=flop,
                    num_sets=kv.shape[2],
                    note=form,
                )


def _forms(num_heads: int, chunk: int, before: int, kv: Tensor, tables: Tensor) -> dict[str, Call]:
    """By name, what the engine runs; the one that it would choose is marked."""
    from baton.kernels.latent_expand import expands
    from baton.kernels.prefill_attention import block_m_for, prefill_tiles
    from baton.kernels.reference_latent import LatentHeads
    from baton.shared.engine.device_columns import Chunk
    from baton.shared.engine.device_latents import attend_absorbed, attend_expanded
    from baton.shared.engine.device_plan import DevicePlan

    total, device = chunk + before, torch.device("cuda")
    block_m = block_m_for(chunk, RANK + ROPE_DIM)
    tiles = torch.from_numpy(
        prefill_tiles(np.array([0, chunk]), np.array([0]), np.array([before]), block_m=block_m)
    ).to(device)
    plan = DevicePlan(
        slots=torch.zeros(0, dtype=torch.int64, device=device),
        context_lens=torch.tensor([total], dtype=torch.int32, device=device),
        block_tables=tables,
        rows=None,
        work=None,
        tiles=tiles,
        block_m=block_m,
        counting=torch.arange(tables.shape[1], dtype=torch.int32, device=device),
    )
    place = Chunk(0, chunk, total, 0, slice(0, len(tiles)))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=_BF16, device=device)

    heads = LatentHeads(draw(num_heads, KEY_DIM, RANK), draw(num_heads, RANK, VALUE_DIM))
    query, out = draw(chunk, num_heads, KEY_DIM + ROPE_DIM), draw(chunk, num_heads, VALUE_DIM)
    sizes = {"num_heads": num_heads, "rank": RANK, "rope_dim": ROPE_DIM, "key_dim": KEY_DIM}
    is_expanded = expands(chunk, total, **sizes, value_dim=VALUE_DIM, itemsize=2)

    def absorbed(i: int) -> None:
        attend_absorbed(query, kv, i, plan, place, heads, SCALE, out)

    def expanded(i: int) -> None:
        attend_expanded(query, kv, i, plan, place, heads, SCALE, out)

    return {
        f"absorbed{'' if is_expanded else ', chosen'}": absorbed,
        f"expanded{', chosen' if is_expanded else ''}": expanded,
    }


def _pool(lens: Sequence[int]) -> tuple[Tensor, Tensor, int]:
    """Random latents of as many layers as no cache holds, tables of random blocks for rows of such
    lengths, and the bytes of a layer's latents."""
    num_bytes = 2 * (RANK + ROPE_DIM) * sum(lens)
    counts = [-(-n // BLOCK_SIZE) for n in lens]
    num_blocks, num_layers = sum(counts), num_sets_for(num_bytes)
    shape = (num_blocks + 1, 1, num_layers, 1, BLOCK_SIZE, RANK + ROPE_DIM)
    kv = torch.randn(shape, dtype=_BF16, device="cuda")
    ids = torch.randperm(num_blocks, device="cuda", dtype=torch.int32)
    tables = torch.zeros(len(lens), max(counts), dtype=torch.int32, device="cuda")
    for row, part in enumerate(torch.split(ids, counts)):
        tables[row, : len(part)] = part
    return kv, tables, num_bytes
