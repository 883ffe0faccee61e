"""Keys and values of 8 bits, widened for the kernel of 16: bit for bit what the reference makes of
them, and attended to as the same codes are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from baton.kernels import hopper_prefill_attention as hopper
from baton.kernels import reference_float8, reference_prefill
from baton.kernels.float8_widen import cut_stretches, num_stretches, widen_stretches
from baton.kernels.prefill_attention import paged_prefill_attention, prefill_tiles
from baton.kernels.reference_float8 import STRETCH_TOKENS
from baton.shared.engine.batch import BatchRow
from baton.shared.engine.device_columns import place_in_stretches
from baton.shared.engine.device_plan import DevicePlan, WidenedChunks
from baton.shared.engine.triton_operations import TritonOperations
from tests.kernels.float8_pools import numbers_of, quantised_pool
from tests.kernels.prefill_cases import Check, PrefillCase, make_case

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYER, NUM_LAYERS = 1, 3


def cut(case: PrefillCase) -> Tensor:
    ends = case.first + np.diff(case.start)
    rows = zip(case.rows.tolist(), case.first.tolist(), ends.tolist(), strict=True)
    stretches, _ = cut_stretches(list(rows))
    return torch.from_numpy(stretches).to(case.query.device)


def room(case: PrefillCase, stretches: Tensor, dtype: torch.dtype, *, more: int = 1) -> Tensor:
    """NaN for all stretches, and `more` blocks."""
    _, kv_heads, _, _, block_size, head_dim = case.kv.shape
    num_blocks = len(stretches) * STRETCH_TOKENS // block_size + more
    shape = (num_blocks, kv_heads, 1, 2, block_size, head_dim)
    return torch.full(shape, float("nan"), dtype=dtype, device=case.kv.device)


def of_all_sizes(case: PrefillCase, dtype: torch.dtype) -> Tensor:
    """Makes the pool one in 8 bits, of vectors whose numbers are lost in 16 bits, or are too large
    for them, zeros, and one that is not finite; → the same on the host."""
    kv = case.kv.float().cpu()
    kv *= torch.exp(8 * torch.randn(*kv.shape[:-1], 1))
    kv[kv.abs() < 1e-2] = 0
    kv[:, -1, LAYER, 1, 3] = float("inf")
    # The interpreter rounds subnormal numbers of bfloat16 in a way of its own.
    is_odd = dtype == torch.bfloat16 and case.kv.device.type == "cpu"
    tiny = kv[:, 0, LAYER, 0, 1]
    largest = tiny.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    tiny *= 2.0 ** (-100 if is_odd else -125) / largest
    case.kv = quantised_pool(kv.to(case.kv.device))
    return quantised_pool(kv)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize(
    ("chunks", "head_dim", "block_size", "window"),
    [
        ([(0, 1)], 128, 16, 0),
        ([(0, 129), (127, 2), (100, 28)], 22, 16, 0),
        ([(300, 5), (0, 7)], 64, 32, 0),
        ([(300, 90), (129, 128), (4, 5)], 16, 16, 70),
        ([(260, 3)], 64, 128, 1),
        ([(200, 60)], 18, 64, 500),
    ],
)
def test_bit_for_bit(
    chunks: list[tuple[int, int]],
    head_dim: int,
    block_size: int,
    window: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Where nobody looks nothing is read, nor written."""
    case = make_case(
        chunks, 2, 2, head_dim, block_size, device, torch.float32, layers=NUM_LAYERS, layer=LAYER
    )
    on_host = of_all_sizes(case, dtype)
    stretches = cut(case)
    assert len(stretches) == sum(num_stretches(before + own) for before, own in chunks)
    for count in (None, len(stretches) - 1):
        counted = None
        if count is not None:
            counted = torch.tensor([count], dtype=torch.int32, device=device)
        expected = room(case, stretches, dtype).cpu()
        given = (LAYER, case.tables.cpu(), stretches.cpu())
        reference_float8.widen_stretches(on_host, *given, expected, window=window, counted=counted)
        out = room(case, stretches, dtype)
        widen_stretches(case.kv, LAYER, case.tables, stretches, out, window=window, counted=counted)
        assert torch.equal(bits(out).cpu(), bits(expected))


def bits(x: Tensor) -> Tensor:
    """Of which any NaN is like any other."""
    x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x)
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def widened_chunks(case: PrefillCase, block_m: int) -> WidenedChunks:
    chunks = [
        (slot, BatchRow([0] * int(count), position, [[]]))
        for slot, position, count in zip(
            case.rows.tolist(), case.first.tolist(), np.diff(case.start), strict=True
        )
    ]
    block_size = case.kv.shape[4]
    seen, first_blocks = place_in_stretches(chunks, block_size)
    tiles = prefill_tiles(case.start, first_blocks, case.first, block_m=block_m)
    device = case.query.device
    stretches = torch.from_numpy(seen).to(device)
    kv = room(case, stretches, case.query.dtype, more=0)
    counting = torch.arange(2 * len(kv), dtype=torch.int32, device=device)
    table = counting.as_strided((len(kv), len(kv)), (1, 1))
    return WidenedChunks(kv, table, stretches, tiles=torch.from_numpy(tiles).to(device))


def attended(
    case: PrefillCase, chunks: Sequence[WidenedChunks], block_m: int, **how: Any
) -> Tensor:
    """What the engine's operation computes of `case`, at places that are NaN before."""
    given = {"scale": case.query.shape[2] ** -0.5, "cap": how.pop("soft_cap", 0.0)}
    given["sinks"] = how.pop("sinks", None)
    plan = DevicePlan(
        slots=case.tables,
        context_lens=case.tables,
        block_tables=case.tables,
        rows=None,
        work=None,
        tiles=None,
        block_m=block_m,
        attended=torch.full_like(case.query, float("nan")),
        widened=tuple(chunks),
        **how,
    )
    return TritonOperations().paged_attention(case.query, case.kv, 1, plan, **given)


def in_8_bits(case: PrefillCase, block_m: int, **how: Any) -> tuple[Tensor, Tensor]:
    """What the kernel makes of it that reads codes, and float64."""
    tiles, scale = case.tiles(block_m), case.query.shape[2] ** -0.5
    actual = paged_prefill_attention(
        case.query, case.kv, 1, tiles, case.tables, scale, block_m=block_m, **how
    )
    expected = reference_prefill.paged_prefill_attention(
        case.query.double(), numbers_of(case.kv), 1, tiles, case.tables, scale,
        block_m=block_m, **how,
    )  # fmt: skip
    return actual, expected


@pytest.mark.parametrize(
    ("chunks", "window", "soft_cap"),
    [([(150, 9), (0, 40)], 0, 0.0), ([(150, 20), (300, 3)], 33, 3.0)],
)
def test_attention(
    chunks: list[tuple[int, int]],
    window: int,
    soft_cap: float,
    device: torch.device,
    dtype: torch.dtype,
    assert_close: Check,
) -> None:
    """Two rows, the second of which has the first one's blocks for its own."""
    case = make_case(chunks, 2, 1, 32, 16, device, dtype)
    case.kv = quantised_pool(case.kv)
    share(case)
    sinks = torch.linspace(-3.0, 2.0, 2, device=device)
    how: dict[str, Any] = {"window": window, "soft_cap": soft_cap, "sinks": sinks}
    out = attended(case, [widened_chunks(case, 16)], 16, **how)
    same, expected = in_8_bits(case, 16, **how)
    assert_close(out, expected)
    assert_close(out, same.double())


def share(case: PrefillCase) -> None:
    """The second row's blocks of which all keys are there become the first's."""
    ends = (case.first + np.diff(case.start)).tolist()
    whole = min(ends) // 16
    first, second = case.rows.tolist()[:2]
    case.tables[second, :whole] = case.tables[first, :whole]


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "block_size"),
    [(64, 16, 2, 16), (128, 8, 8, 16), (128, 32, 8, 32), (256, 8, 2, 16), (128, 4, 1, 128)],
)
@pytest.mark.parametrize("window", [0, 300])
def test_attention_of_models(
    head_dim: int,
    heads: int,
    kv_heads: int,
    block_size: int,
    window: int,
    device: torch.device,
    dtype: torch.dtype,
    assert_close: Check,
) -> None:
    """By the kernel for compute capability 9.0; what it is given to write to is NaN, and what was
    left of keys by the turn before."""
    chunks = [(0, 700), (1500, 513), (4000, 130), (33, 90), (0, 128)]
    case = make_case(chunks, heads, kv_heads, head_dim, block_size, device, dtype)
    case.kv = quantised_pool(case.kv)
    made = widened_chunks(case, 128)
    if hopper._processors(device):
        assert hopper.covers(case.query, made.kv, block_m=128, window=window, has_sinks=True)
    sinks = torch.linspace(-3.0, 2.0, heads, device=device)
    how: dict[str, Any] = {"window": window, "sinks": sinks}
    out = attended(case, [made], 128, **how)
    same, expected = in_8_bits(case, 128, **how)
    assert_close(out, expected)
    assert_close(out, same.double())
    for _ in range(3):
        assert torch.equal(attended(case, [made], 128, **how), out)
