"""Decode attention against float64, at awkward shapes, over a pool full of NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from baton.kernels.decode_attention import (
    DecodeConfig,
    DecodeWork,
    decode_config,
    make_work,
    paged_decode_attention,
    plan_decode,
)
from baton.kernels.reference_attention import decode_attention_reference
from tests.kernels.float8_pools import numbers_of, quantised_pool

Check = Callable[[Tensor, Tensor], None]
NUM_LAYERS, LAYER = 3, 1


class Problem:
    """Rows with shuffled blocks; whatever attention must not use is NaN or an impossible id."""

    def __init__(
        self,
        lengths: list[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 32,
        block_size: int = 16,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> None:
        """A length of 0 makes a padding row."""
        real = [row for row, length in enumerate(lengths) if length]
        num_slots = len(real) + 2
        slots = torch.randperm(num_slots)[: len(real)]
        self.rows = torch.full((len(lengths),), -1, dtype=torch.int32)
        self.rows[real] = slots.int()
        self.context_lens = torch.full((num_slots,), 0x7EADBEEF, dtype=torch.int32)
        width = -(-max(lengths) // block_size) + 1
        self.block_tables = torch.full((num_slots, width), 0x7EADBEEF, dtype=torch.int32)
        num_blocks = sum(-(-length // block_size) for length in lengths) + 3
        free = torch.randperm(num_blocks).tolist()
        shape = (num_blocks + 1, num_kv_heads, NUM_LAYERS, 2, block_size, head_dim)
        self.kv = torch.full(shape, float("nan"), dtype=dtype)
        for row, slot in zip(real, slots.tolist(), strict=True):
            length = lengths[row]
            self.context_lens[slot] = length
            for block in range(max(length - window, 0) // block_size if window else 0, width - 1):
                first = block * block_size
                if first >= length:
                    break
                self.block_tables[slot, block] = free.pop()
                used = self.kv[self.block_tables[slot, block], :, LAYER]
                low = max(length - window - first, 0) if window else 0
                used[:, :, low : length - first] = torch.randn(
                    used[:, :, low : length - first].shape
                ).to(dtype)
        # A view into a wider row, as a fused projection gives it.
        wide = torch.randn(len(lengths), num_heads + 2 * num_kv_heads, head_dim).to(dtype)
        wide[:, num_heads:] = float("nan")
        self.query = wide.to(device)[:, :num_heads]
        self.kv = self.kv.to(device)
        self.rows = self.rows.to(device)
        self.context_lens = self.context_lens.to(device)
        self.block_tables = self.block_tables.to(device)
        self.scale = head_dim**-0.5
        self.window = window
        self.soft_cap = soft_cap
        self.sinks: Tensor | None = None

    def work(self, *, config: DecodeConfig | None = None, **kwargs: Any) -> DecodeWork:
        num_rows, num_heads, head_dim = self.query.shape
        device = self.query.device
        work = make_work(
            num_rows, self.kv.shape[1], num_heads, head_dim, device, config=config, **kwargs
        )
        work.partial.fill_(float("nan"))
        work.weight.fill_(float("nan"))
        return work

    def plan(self, work: DecodeWork) -> None:
        plan_decode(self.rows, self.context_lens, work, window=self.window)

    def attend(self, work: DecodeWork, *, pdl: bool = False) -> Tensor:
        out = torch.full_like(self.query, float("nan"), memory_format=torch.contiguous_format)
        back = paged_decode_attention(
            self.query,
            self.kv,
            LAYER,
            self.rows,
            self.context_lens,
            self.block_tables,
            work,
            self.scale,
            window=self.window,
            soft_cap=self.soft_cap,
            sinks=self.sinks,
            out=out,
            pdl=pdl,
        )
        assert back is out
        return out

    def reference(self) -> Tensor:
        return decode_attention_reference(
            self.query.double(),
            numbers_of(self.kv),
            LAYER,
            self.rows,
            self.context_lens,
            self.block_tables,
            self.scale,
            window=self.window,
            soft_cap=self.soft_cap,
            sinks=self.sinks,
        )


SMALL = DecodeConfig(block_n=16, programs=12)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("lengths", "shape"),
    [
        ([1], {}),
        ([75, 0, 16, 17], {"head_dim": 80, "num_heads": 10}),
        ([33, 64], {"head_dim": 16, "block_size": 32, "num_heads": 3, "num_kv_heads": 1}),
        ([130, 3], {"head_dim": 22, "block_size": 64}),
        ([40], {"head_dim": 128, "num_heads": 20, "num_kv_heads": 1}),
    ],
)
def test_matches_float64(
    lengths: list[int],
    shape: dict[str, int],
    fused: bool,
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Check,
) -> None:
    problem = Problem(lengths, dtype, device, **shape)
    work = problem.work(config=replace(SMALL, fused=fused))
    problem.plan(work)
    assert_close(problem.attend(work), problem.reference())


def test_rows_of_no_sequence_become_zero(device: torch.device) -> None:
    problem = Problem([5, 0, 0], torch.float32, device)
    work = problem.work(config=SMALL)
    problem.plan(work)
    assert not problem.attend(work)[1:].any()


@pytest.mark.parametrize("window", [1, 16, 23])
@pytest.mark.parametrize("block_size", [16, 64])
def test_window(
    window: int, block_size: int, dtype: torch.dtype, device: torch.device, assert_close: Check
) -> None:
    problem = Problem([95, 12, 64], dtype, device, block_size=block_size, window=window)
    work = problem.work(config=SMALL)
    problem.plan(work)
    assert_close(problem.attend(work), problem.reference())


@pytest.mark.parametrize("window", [0, 23])
def test_soft_cap(
    window: int, dtype: torch.dtype, device: torch.device, assert_close: Check
) -> None:
    problem = Problem([95, 0, 12], dtype, device, window=window, soft_cap=2.0)
    problem.scale = 1.0  # scores far beyond the cap, and of both signs
    work = problem.work(config=SMALL)
    problem.plan(work)
    assert_close(problem.attend(work), problem.reference())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("window", [0, 23])
def test_sinks(
    window: int, fused: bool, dtype: torch.dtype, device: torch.device, assert_close: Check
) -> None:
    """Rows of one item, of several, and of none; heads that the sinks outweigh."""
    problem = Problem([95, 0, 12], dtype, device, num_heads=6, window=window)
    problem.sinks = torch.tensor([0.5, 60.0, -3.0, 0.0, 2.0, 1.0], device=device)
    work = problem.work(config=replace(SMALL, fused=fused))
    problem.plan(work)
    assert_close(problem.attend(work), problem.reference())


def test_the_widest_heads(dtype: torch.dtype, device: torch.device, assert_close: Check) -> None:
    problem = Problem([40, 1], dtype, device, head_dim=512)
    work = problem.work(config=replace(decode_config(2, 2, 512), programs=12))
    problem.plan(work)
    assert_close(problem.attend(work), problem.reference())


def test_tile_of_several_blocks_and_defaults(
    dtype: torch.dtype, device: torch.device, assert_close: Check
) -> None:
    problem = Problem([200, 64, 65], dtype, device, head_dim=64)
    work = problem.work()
    assert work.config == decode_config(3, 2, 64)
    problem.plan(work)
    assert_close(problem.attend(work), problem.reference())


@pytest.mark.parametrize("length, num_items", [(1, 1), (64, 1), (65, 2), (1000, 16)])
def test_one_row_has_items_of_two_tiles(
    length: int, num_items: int, dtype: torch.dtype, device: torch.device, assert_close: Check
) -> None:
    problem = Problem([length], dtype, device, head_dim=64)
    work = problem.work()
    problem.plan(work)
    assert work.row_items[0].tolist() == [0, num_items]
    assert_close(problem.attend(work), problem.reference())


def test_what_is_behind_one_row_waits_for_it() -> None:
    assert not decode_config(1, 8, 128).overlaps
    assert not decode_config(1, 8, 128, itemsize=1).overlaps
    assert decode_config(2, 8, 128).overlaps
    assert decode_config(1, 8, 128, width=5).overlaps


def test_one_work_serves_step_after_step(device: torch.device, assert_close: Check) -> None:
    work = None
    for lengths in ([100, 20], [1, 1], [7, 90], [0, 300]):
        problem = Problem(lengths, torch.float32, device)
        work = work or problem.work(config=SMALL)
        problem.plan(work)
        for _ in range(2):  # two layers under one plan
            assert_close(problem.attend(work), problem.reference())
        assert not work.arrived.any()


@pytest.mark.parametrize("num_items", [None, 6, 40])
@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize(
    "lengths", [[1], [1000, 1, 0, 17, 16], [64] * 5, [0, 0, 0], [0, 5000, 1, 1], [333, 129, 500]]
)
def test_plan_covers_every_key_once(
    lengths: list[int], window: int, num_items: int | None, device: torch.device
) -> None:
    tile, num_rows = 16, len(lengths)
    context_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    slots = torch.arange(num_rows, dtype=torch.int32, device=device)
    rows = torch.where(context_lens > 0, slots, -1)
    work = make_work(num_rows, 2, 4, 16, device, num_items=num_items, config=SMALL)
    work.items.fill_(0x7EADBEEF)
    plan_decode(rows, context_lens, work, window=window)
    used = [entry for entry in work.items.tolist() if entry[0] >= 0]
    assert [entry[0] for entry in work.items.tolist()[len(used) :]].count(-1) == len(
        work.items
    ) - len(used)
    share = len(work.items) - num_rows
    begins = [max(length - window, 0) if window else 0 for length in lengths]
    num_tiles = [
        -(-length // tile) - begin // tile for length, begin in zip(lengths, begins, strict=True)
    ]
    limit = max(1, -(-sum(num_tiles) // share))
    for row, length in enumerate(lengths):
        numbers = [number for number, entry in enumerate(used) if entry[0] == row]
        assert work.row_items[row].tolist() == [numbers[0], len(numbers)]
        at = begins[row]
        for number in numbers:
            _, slot, begin, end, first_item, num_splits, *_ = used[number]
            assert slot == (row if length else -1)
            assert (first_item, num_splits) == (numbers[0], len(numbers))
            assert begin == at and (end > begin or not length)
            assert begin == begins[row] or begin % tile == 0
            assert -(-end // tile) - begin // tile <= limit, "one program has too much to do"
            at = end
        assert at == length


def test_refuses_what_the_work_was_not_made_for(device: torch.device) -> None:
    problem = Problem([5, 6], torch.float32, device)
    work = problem.work(config=SMALL)
    with pytest.raises(ValueError, match="planned for window None"):
        problem.attend(work)
    problem.plan(work)
    with pytest.raises(ValueError, match="2 rows"):
        plan_decode(problem.rows[:1], problem.context_lens, work)
    problem.query = problem.query[:1]
    with pytest.raises(ValueError, match="not what the work was made for"):
        problem.attend(work)
    with pytest.raises(ValueError, match="not more than"):
        problem.work(num_items=1)
    with pytest.raises(ValueError, match="evenly"):
        make_work(1, 2, 5, 16, device)


gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LLAMA = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}


@gpu
@needs_gpu
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("lengths", [[1025], [9000, 0, 3, 64] + [700] * 29, [100] * 256])
def test_real_shapes(
    lengths: list[int],
    block_size: int,
    fused: bool,
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Check,
) -> None:
    problem = Problem(lengths, dtype, device, block_size=block_size, **LLAMA)
    config = replace(decode_config(len(lengths), 8, 128), fused=fused)
    work = problem.work(config=config)
    problem.plan(work)
    reference = problem.reference()
    first = problem.attend(work)
    assert_close(first, reference)
    # Whichever program comes last adds up in the same order: a difference would be a race.
    for turn in range(100):
        assert torch.equal(problem.attend(work, pdl=turn % 2 == 1), first)


@gpu
@needs_gpu
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}, {"window": 4096}),
        ({"num_heads": 16, "num_kv_heads": 8, "head_dim": 256}, {"window": 1024}),
        ({"num_heads": 16, "num_kv_heads": 8, "head_dim": 256}, {"soft_cap": 5.0}),
        ({"num_heads": 32, "num_kv_heads": 4, "head_dim": 512}, {}),
    ],
)
def test_shapes_of_other_models(
    shape: dict[str, int],
    options: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Check,
) -> None:
    problem = Problem([9000, 0, 3, 64] + [700] * 29, dtype, device, **shape, **options)
    work = problem.work()
    problem.plan(work)
    assert_close(problem.attend(work, pdl=True), problem.reference())


@gpu
@needs_gpu
@pytest.mark.parametrize("pdl", [False, True])
def test_one_graph_serves_every_length(
    pdl: bool, dtype: torch.dtype, device: torch.device, assert_close: Check
) -> None:
    largest = Problem([3000, 3000, 3000, 3000], dtype, device, **LLAMA)
    work = largest.work()
    largest.plan(work)
    largest.attend(work, pdl=pdl)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        largest.plan(work)
        out = largest.attend(work)
        again = largest.attend(work, pdl=pdl)
    for lengths in ([3000, 1, 17, 0], [0, 0, 0, 1], [2999, 800, 64, 65], [5, 5, 5, 5]):
        problem = Problem(lengths, dtype, device, **LLAMA)
        largest.rows.copy_(problem.rows)
        num_slots, width = problem.block_tables.shape
        largest.context_lens[:num_slots] = problem.context_lens
        largest.block_tables[:num_slots, :width] = problem.block_tables
        largest.kv[: problem.kv.shape[0]] = problem.kv
        largest.query.copy_(problem.query)
        again.fill_(float("nan"))
        graph.replay()
        assert_close(out, problem.reference())
        assert torch.equal(out, again)


@gpu
@needs_gpu
def test_pool_of_more_than_2_31_elements(device: torch.device, assert_close: Check) -> None:
    problem = Problem([500, 33], torch.float16, device, **LLAMA)
    small = problem.kv
    num_blocks = 2**31 // small[0].numel() + small.shape[0]
    problem.kv = torch.empty(num_blocks, *small.shape[1:], dtype=small.dtype, device=device)
    problem.kv[-small.shape[0] :] = small
    work = problem.work()
    problem.plan(work)
    tables, problem.block_tables = problem.block_tables, problem.block_tables.clone()
    is_block = problem.block_tables < small.shape[0]
    problem.block_tables[is_block] += num_blocks - small.shape[0]
    out = problem.attend(work)
    problem.kv, problem.block_tables = small, tables
    assert_close(out, problem.reference())


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_a_token_whose_query_is_infinite_attends_to_no_number(
    kv_dtype: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Of a row with drafts, also where all its scores are −∞; other tokens of it are what they
    are."""
    width, head_dim = 3, 256  # Too wide for decode_float8.py.
    problem = Problem([40], dtype, device, head_dim=head_dim)
    keys = problem.kv[:, :, LAYER, 0]
    keys[..., 5] = -1 - keys[..., 5].abs()
    if kv_dtype == "fp8":
        problem.kv = quantised_pool(problem.kv)
    problem.query = torch.randn(width, 4, head_dim, device=device).to(dtype)
    problem.query[1, 2, 5] = float("inf")
    drafts = torch.full_like(problem.context_lens, width - 1)
    work = make_work(1, 2, 4, head_dim, device, config=SMALL, width=width)
    plan_decode(problem.rows, problem.context_lens, work, num_drafts=drafts)
    rows = problem.rows.repeat_interleave(width)
    out = paged_decode_attention(
        problem.query, problem.kv, LAYER, rows, problem.context_lens, problem.block_tables, work,
        problem.scale,
    )  # fmt: skip
    assert out[1, 2].isnan().all()
    out[1, 2] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("lengths", "width", "shape"),
    [
        ([33], 2, {}),
        # Drafts that begin a tile of their own, rows without any, and padding.
        ([70, 0, 17, 4], 4, {"head_dim": 22, "num_heads": 6, "soft_cap": 5.0}),
        ([90, 21], 5, {"window": 19, "num_heads": 8}),
        ([34], 16, {"num_heads": 4, "num_kv_heads": 1, "window": 3}),
        # As many as have larger tiles in steps of 16-bit numbers.
        ([150, 64, 9, 70, 5, 63, 65, 128, 17], 5, {}),
    ],
)
def test_tokens_of_a_row_share_its_keys(
    lengths: list[int],
    width: int,
    shape: dict[str, Any],
    fused: bool,
    kv_dtype: str,
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Check,
) -> None:
    """Each sees the keys up to its own; as many items as there may be, so that some have keys that
    a token does not see."""
    # Room before the window of the first token.
    held = {**shape, "window": shape["window"] + width} if "window" in shape else shape
    problem = Problem(lengths, dtype, device, **held)
    window = problem.window = shape.get("window", 0)
    if kv_dtype == "fp8":
        problem.kv = quantised_pool(problem.kv)
    num_rows, num_heads, head_dim = problem.query.shape
    query = torch.randn(num_rows * width, num_heads, head_dim, device=device).to(dtype)
    num_drafts = torch.zeros(len(problem.context_lens), dtype=torch.int32, device=device)
    for row, slot in enumerate(problem.rows.tolist()):
        if slot >= 0:
            num_drafts[slot] = max(width - 1 - row, 0)
    problem.sinks = torch.randn(num_heads, device=device)
    itemsize = problem.kv.element_size()
    # Of 8 bits each warp has 16 keys of its own (decode_float8.py).
    config = SMALL if itemsize > 1 else replace(SMALL, block_n=32, num_warps=2)
    if num_rows >= 9:
        config = decode_config(num_rows, 2, head_dim, width=width, itemsize=itemsize)
    work = make_work(
        num_rows, problem.kv.shape[1], num_heads, head_dim, device,
        config=replace(config, fused=fused), width=width, num_items=num_rows + 9,
    )  # fmt: skip
    work.partial.fill_(float("nan"))
    work.weight.fill_(float("nan"))
    plan_decode(problem.rows, problem.context_lens, work, num_drafts=num_drafts, window=window)
    rows = problem.rows.repeat_interleave(width)
    out = paged_decode_attention(
        query, problem.kv, LAYER, rows, problem.context_lens, problem.block_tables, work,
        problem.scale, window=window, soft_cap=problem.soft_cap, sinks=problem.sinks,
        out=torch.full_like(query, float("nan")),
    )  # fmt: skip
    assert torch.isfinite(out).all()
    for row, slot in enumerate(problem.rows.tolist()):
        for token in range(1 + int(num_drafts[slot])) if slot >= 0 else ():
            end = problem.context_lens.clone()
            end[slot] -= num_drafts[slot] - token
            at = slice(row * width + token, row * width + token + 1)
            expected = decode_attention_reference(
                query[at].double(), numbers_of(problem.kv), LAYER, rows[at], end,
                problem.block_tables, problem.scale, window=window, soft_cap=problem.soft_cap,
                sinks=problem.sinks,
            )  # fmt: skip
            assert_close(out[at], expected)
