"""The points of kernel_points.py that need keys and values: attention, rope with the store."""

# A point is measured before the next one is made, so functions may refer to loop variables.
# ruff: noqa: B023

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from baton.kernels.split_prefill_attention import ItemConfig
from benchmarks.gpu.gpu_timing import Call, Point, num_sets_for

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
_BF16 = torch.bfloat16


def decode_attention() -> Iterator[Point]:
    from baton.kernels.decode_attention import make_work, paged_decode_attention, plan_decode

    device = torch.device("cuda")
    mixed = [200 * i + 17 for i in range(1, 33)]
    cases = [(f"{n}×{c}", [c] * n) for n, c in ((1, 1024), (32, 1024), (128, 1024), (256, 1024))]
    cases += [("1×8192", [8192]), ("32×8192", [8192] * 32), ("32 mixed", mixed)]
    for name, lens in cases:
        num_rows, num_keys = len(lens), sum(lens)
        num_bytes = 2 * (2 * KV_HEADS * HEAD_DIM * num_keys + 2 * num_rows * HEADS * HEAD_DIM)
        num_sets = num_sets_for(num_bytes)
        library = _sdpa_decode(num_rows, lens[0], num_sets) if len(set(lens)) == 1 else {}
        for block_size in (16, 32, 64):
            kv, tables = _pool(lens, num_sets, block_size)
            rows = torch.arange(num_rows, dtype=torch.int32, device=device)
            context_lens = torch.tensor(lens, dtype=torch.int32, device=device)
            query = torch.randn(num_rows, HEADS, HEAD_DIM, dtype=_BF16, device=device)
            out = torch.empty_like(query)
            work = make_work(num_rows, KV_HEADS, HEADS, HEAD_DIM, device)
            plan_decode(rows, context_lens, work)
            if block_size == 16:

                def plan(_: int) -> None:
                    plan_decode(rows, context_lens, work)

                yield Point(f"plan {name}", plan, num_bytes=8 * num_rows)

            def attend(i: int) -> None:
                paged_decode_attention(
                    query, kv, i, rows, context_lens, tables, work, HEAD_DIM**-0.5, out=out
                )

            yield Point(
                f"{name} /{block_size}", attend, num_bytes, num_sets=num_sets, library=library
            )


def split_prefill_attention() -> Iterator[Point]:
    """Few tokens behind many."""
    from baton.kernels.split_prefill_attention import item_config

    kv = torch.empty(0, KV_HEADS, 1, 2, 16, HEAD_DIM, dtype=_BF16, device="cuda")
    config = item_config(HEADS, KV_HEADS, HEAD_DIM, kv.element_size(), kv.device)
    for num_new, num_cached in ((16, 8192), (64, 512), (64, 8192), (64, 32768), (128, 8192)):
        yield split_point(num_new, num_cached, config)


def split_point(
    num_new: int, num_cached: int, config: ItemConfig, programs: int | None = None
) -> Point:
    from baton.kernels.prefill_attention import prefill_tiles
    from baton.kernels.prefill_items import cut_items
    from baton.kernels.split_prefill_attention import make_item_work
    from baton.kernels.split_prefill_attention import split_prefill_attention as attend

    device = torch.device("cuda")
    num_keys = num_cached + num_new
    num_bytes = 2 * (2 * KV_HEADS * HEAD_DIM * num_keys + 2 * num_new * HEADS * HEAD_DIM)
    num_sets = num_sets_for(num_bytes)
    kv, tables = _pool([num_keys], num_sets, 16)
    query = torch.randn(num_new, HEADS, HEAD_DIM, dtype=_BF16, device=device)
    out = torch.empty_like(query)
    work = make_item_work(config, HEADS, HEAD_DIM, device, num_programs=programs)
    tiles = prefill_tiles(
        np.array([0, num_new]), np.array([0]), np.array([num_cached]), block_m=config.block_m
    )
    cut = cut_items(tiles, block_n=config.block_n, most_cuts=work.most_cuts)
    items = torch.from_numpy(cut).to(device)
    count = torch.tensor([len(cut)], dtype=torch.int32, device=device)

    def call(i: int) -> None:
        attend(query, kv, i, items, count, tables, work, HEAD_DIM**-0.5, out=out)

    num_pairs = num_new * num_cached + num_new * (num_new + 1) // 2
    return Point(
        f"{num_new} behind {num_cached}",
        call,
        num_bytes,
        flop=4 * HEADS * HEAD_DIM * num_pairs,
        num_sets=num_sets,
        note=f"{len(cut)} items",
    )


def prefill_attention() -> Iterator[Point]:
    """What the engine runs; beside it, where that is another kernel, the one in Triton."""
    from baton.kernels import hopper_prefill_attention as hopper
    from baton.kernels.prefill_attention import (
        PrefillConfig,
        block_m_for,
        paged_prefill_attention,
        prefill_tiles,
    )

    in_triton = PrefillConfig(1, 128, 8, 3)
    for chunk, before in ((512, 0), (512, 6144), (2048, 0), (2048, 6144), (8192, 0)):
        total = chunk + before
        block_m = block_m_for(chunk, HEAD_DIM)
        tiles = torch.from_numpy(
            prefill_tiles(np.array([0, chunk]), np.array([0]), np.array([before]), block_m=block_m)
        ).cuda()
        query = torch.randn(chunk, HEADS, HEAD_DIM, dtype=_BF16, device="cuda")
        out = torch.empty_like(query)
        library = _sdpa_prefill(chunk, total)
        for block_size in (16, 64):
            num_sets = min(8, num_sets_for(4 * KV_HEADS * HEAD_DIM * total))
            kv, tables = _pool([total], num_sets, block_size)

            is_hopper = hopper.covers(query, kv, block_m=block_m, window=0)
            for config in (None, in_triton) if is_hopper else (None,):

                def attend(i: int) -> None:
                    paged_prefill_attention(
                        query, kv, i, tiles, tables, HEAD_DIM**-0.5,
                        block_m=block_m, out=out, config=config,
                    )  # fmt: skip

                yield Point(
                    f"{chunk} over {before} /{block_size}",
                    attend,
                    num_bytes=4 * (KV_HEADS * total + HEADS * chunk) * HEAD_DIM,
                    flop=4.0 * HEADS * HEAD_DIM * (chunk * before + chunk * (chunk + 1) / 2),
                    num_sets=num_sets,
                    library=library if config is None else {},
                    note="" if config is None else "triton",
                )


def rope_and_store() -> Iterator[Point]:
    from baton.kernels.rope_store import rope_and_store

    angles = torch.rand(8192, HEAD_DIM // 2, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    heads = HEADS + 2 * KV_HEADS
    for rows in (1, 32, 256, 2048, 8192):
        num_sets = num_sets_for(2 * rows * heads * HEAD_DIM * 2)
        qkv = [
            torch.randn(rows, heads, HEAD_DIM, dtype=_BF16, device="cuda") for _ in range(num_sets)
        ]
        kv, _ = _pool([8192], min(num_sets, 8), 16)
        positions = torch.arange(rows, dtype=torch.int32, device="cuda")
        slots = torch.randperm(8192, device="cuda")[:rows]
        out = torch.empty(rows, HEADS, HEAD_DIM, dtype=_BF16, device="cuda")
        layers = kv.shape[2]

        def ours(i: int) -> None:
            rope_and_store(
                qkv[i], cos, sin, positions, slots, kv, i % layers, num_heads=HEADS, out=out
            )

        def torch_ops(i: int) -> None:
            x = qkv[i][:, : HEADS + KV_HEADS]
            half = HEAD_DIM // 2
            angle_cos, angle_sin = cos[positions][:, None], sin[positions][:, None]
            first, second = x[..., :half].float(), x[..., half:].float()
            rotated = torch.cat(
                (
                    first * angle_cos - second * angle_sin,
                    second * angle_cos + first * angle_sin,
                ),
                -1,
            ).to(x.dtype)
            block, offset = slots // 16, slots % 16
            kv[block, :, i % layers, 0, offset] = rotated[:, HEADS:]
            kv[block, :, i % layers, 1, offset] = qkv[i][:, HEADS + KV_HEADS :]

        yield Point(
            str(rows),
            ours,
            num_bytes=2 * rows * heads * HEAD_DIM * 2,
            num_sets=num_sets,
            library={"torch": torch_ops},
        )


def _pool(lens: Sequence[int], num_layers: int, block_size: int) -> tuple[Tensor, Tensor]:
    """A pool of random keys and values and tables of random blocks for rows of such lengths."""
    counts = [-(-n // block_size) for n in lens]
    num_blocks = sum(counts)
    shape = (num_blocks + 1, KV_HEADS, num_layers, 2, block_size, HEAD_DIM)
    kv = torch.randn(shape, dtype=_BF16, device="cuda")
    ids = torch.randperm(num_blocks, device="cuda", dtype=torch.int32)
    tables = torch.zeros(len(lens), max(counts), dtype=torch.int32, device="cuda")
    for row, part in enumerate(torch.split(ids, counts)):
        tables[row, : len(part)] = part
    return kv, tables


def _sdpa_decode(num_rows: int, num_keys: int, num_sets: int) -> dict[str, Call]:
    """torch's attention over contiguous keys and values, which needs no block table."""
    query = torch.randn(num_rows, HEADS, 1, HEAD_DIM, dtype=_BF16, device="cuda")
    shape = (num_rows, KV_HEADS, num_keys, HEAD_DIM)
    keys = [torch.randn(shape, dtype=_BF16, device="cuda") for _ in range(num_sets)]
    values = [torch.randn(shape, dtype=_BF16, device="cuda") for _ in range(num_sets)]
    return _sdpa(query, keys, values, is_causal=False)


def _sdpa_prefill(chunk: int, total: int) -> dict[str, Call]:
    query = torch.randn(1, HEADS, chunk, HEAD_DIM, dtype=_BF16, device="cuda")
    shape = (1, KV_HEADS, total, HEAD_DIM)
    key, value = (torch.randn(shape, dtype=_BF16, device="cuda") for _ in range(2))
    if chunk == total:
        return _sdpa(query, [key], [value], is_causal=True)
    from torch.nn.attention.bias import causal_lower_right

    # Not every backend repeats KV heads under this mask; repeated keys stay in the cache.
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    mask = causal_lower_right(chunk, total)
    return {
        "lower right": lambda _: functional.scaled_dot_product_attention(query, key, value, mask)
    }


def _sdpa(
    query: Tensor, keys: list[Tensor], values: list[Tensor], *, is_causal: bool
) -> dict[str, Call]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def with_backend(backend: SDPBackend) -> Call:
        def call(i: int) -> Tensor:
            with sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(
                    query,
                    keys[i % len(keys)],
                    values[i % len(keys)],
                    is_causal=is_causal,
                    enable_gqa=True,
                )

        return call

    return {
        "cuDNN": with_backend(SDPBackend.CUDNN_ATTENTION),
        "flash": with_backend(SDPBackend.FLASH_ATTENTION),
    }
