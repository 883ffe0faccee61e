"""Keys and values in 8 bits: stores bit for bit, attention against float64 over the same codes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels import decode_attention, reference_float8
from baton.kernels.decode_plan import TEAM_KEYS, decode_config, takes_teams
from baton.kernels.float8_jit import casts_codes, has_assembler, neighbours, small_halves
from baton.kernels.kv_store import store_kv
from baton.kernels.prefill_attention import PrefillConfig, block_m_for
from baton.kernels.rope_store import rope_and_store
from baton.kernels.split_prefill_attention import ItemConfig, item_config
from tests.device import ROOT, process_environment
from tests.kernels import test_decode_attention, test_split_prefill_attention
from tests.kernels.float8_pools import empty_pool, quantised_pool
from tests.kernels.prefill_cases import Check, make_case
from tests.kernels.test_decode_attention import SMALL, Problem

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LAYER, NUM_LAYERS = 1, 3


def vectors(*shape: int) -> Tensor:
    """Numbers of all sizes: large and small vectors, with numbers far below their largest."""
    x = torch.randn(shape) * torch.exp(4 * torch.randn(*shape[:-1], 1))
    return torch.where(torch.rand(shape) < 0.2, x * 2e-3, x)


def test_codes_are_those_of_the_smallest_power_of_two() -> None:
    x = vectors(1000, 48)
    x[0], x[1, 0], x[2] = 0, 448 * 2.0**-20, 448.0
    codes, exponents = reference_float8.quantised(x)
    scale = reference_float8.scales(exponents)
    largest = codes.double().abs().amax(-1)
    assert largest.max() <= 448
    assert largest[1:].min() >= 224, "half the scale would have done"
    assert torch.equal(scale.log2().frac(), torch.zeros_like(scale))
    numbers = codes.double() * scale[:, None]
    assert not numbers[0].any()
    # Four digits, or the last place of the smallest codes.
    allowed = torch.maximum(x.double().abs() * 2**-4, scale[:, None] * 2.0**-10)
    assert bool(((numbers - x.double()).abs() <= allowed).all())
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal((codes.to(dtype) * scale[:, None].to(dtype)).double(), numbers)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_vector_that_is_not_finite_stays_so(bad: float) -> None:
    x = vectors(3, 16)
    x[1, 7] = bad
    codes, exponents = reference_float8.quantised(x)
    numbers = codes.float() * reference_float8.scales(exponents)[:, None]
    assert numbers[1].isnan().all() and numbers[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("tokens", "kv_heads", "head_dim", "block_size"),
    [(1, 2, 128, 16), (5, 3, 18, 16), (3, 2, 80, 2)],
)
def test_stores(
    tokens: int, kv_heads: int, head_dim: int, block_size: int, device: torch.device
) -> None:
    """Both kernels and the torch reference, bit for bit; nothing else is touched."""
    num_heads, num_blocks = 2, 24
    qkv = vectors(tokens, num_heads + 2 * kv_heads, head_dim)
    qkv[0, -1, 3] = float("nan")
    slots = torch.randperm(num_blocks * block_size)[:tokens]
    slots[tokens // 2] = -1
    key, value = qkv[:, num_heads:].chunk(2, 1)
    shape = (num_blocks + 1, kv_heads, NUM_LAYERS, 2, block_size, head_dim)

    expected = empty_pool(shape, torch.device("cpu"))
    exponents = reference_float8.exponents_of(expected)
    for token, slot in enumerate(slots.tolist()):
        for which, column in enumerate((key, value)):
            if slot >= 0:
                place = (slot // block_size, slice(None), LAYER, which, slot % block_size)
                expected[place], exponents[place] = reference_float8.quantised(column[token])
    wanted = reference_float8.heads_of(expected)

    pool = empty_pool(shape, device)
    store_kv(key.to(device), value.to(device), pool, LAYER, slots.to(device))
    assert torch.equal(reference_float8.heads_of(pool).cpu(), wanted)

    pool = empty_pool(shape, device)
    # An angle of zero turns nothing.
    cos, sin = (torch.full((1, head_dim // 2), x, device=device) for x in (1.0, 0.0))
    positions = torch.zeros(tokens, dtype=torch.int32, device=device)
    rope_and_store(
        qkv.to(device), cos, sin, positions, slots.to(device), pool, LAYER, num_heads=num_heads
    )
    assert torch.equal(reference_float8.heads_of(pool).cpu(), wanted)

    pool = empty_pool(shape, torch.device("cpu"))
    rows = torch.arange(kv_heads) + (slots[slots >= 0] // block_size * kv_heads)[:, None]
    rows = ((rows * NUM_LAYERS + LAYER) * 2) * block_size + (slots[slots >= 0] % block_size)[
        :, None
    ]
    for which, column in enumerate((key, value)):
        stored = column[slots >= 0].reshape(-1, head_dim)
        reference_float8.store(stored, pool, rows.reshape(-1) + which * block_size)
    assert torch.equal(reference_float8.heads_of(pool), wanted)


def attended(problem: Problem, **work: Any) -> tuple[Tensor, Tensor]:
    """Over the problem's keys in 8 bits, and what float64 says of the same."""
    problem.kv = quantised_pool(problem.kv)
    made = problem.work(**work)
    problem.plan(made)
    return problem.attend(made), problem.reference()


def test_vectors_of_128_codes_are_lines_of_a_cache() -> None:
    """Where layers come in fours. What lies across two lines is read twice."""
    pool = empty_pool((5, 3, 8, 2, 16, 128), torch.device("cpu"))
    assert all(stride % 128 == 0 for stride in pool.stride()[:-1]) and pool.stride(-1) == 1
    exponents = reference_float8.exponents_of(pool)
    assert exponents.shape == pool.shape[:-1] and exponents.stride()[2:] == (32, 16, 1)
    # Each byte is of a code or of a scale.
    heads = reference_float8.heads_of(pool)
    pool.view(torch.uint8).fill_(1)
    exponents.fill_(2)
    assert torch.equal(heads, torch.tensor([1, 2]).repeat_interleave(
        torch.tensor([8 * 2 * 16 * 128, 8 * 2 * 16])
    ).expand_as(heads))  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _halves_of(  # type: ignore[no-untyped-def]
    source, target, CASTS: tl.constexpr, NEXT: tl.constexpr, ASM: tl.constexpr
):
    row, column = tl.arange(0, 16), tl.arange(0, 64)
    at = (row[:, None] * 64 + column[None, :])[None, :, :]
    pairs = tl.load(source + tl.program_id(0) * 1024 + at)
    one, other = neighbours(pairs, ASM) if NEXT else small_halves(pairs, CASTS, ASM)
    target += tl.program_id(0) * 2048 + at
    tl.store(target, one)
    tl.store(target + 1024, other)


@pytest.mark.parametrize("how", ["neighbours", "cast", "moved"])
def test_codes_become_float16(how: str, device: torch.device) -> None:
    """Each pair of codes that are numbers."""
    pairs = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(64, 16, 64)
    codes = pairs.view(torch.uint8).view(64, 16, 64, 2)
    codes[(codes & 0x7F) == 0x7F] = 0
    found = torch.empty(64, 2, 16, 64, dtype=torch.float16, device=device)
    if how != "moved" and not casts_codes(device):
        pytest.skip("the GPU has no instruction for it")
    _halves_of[(64,)](
        pairs.to(device), found, CASTS=how == "cast", NEXT=how == "neighbours", ASM=has_assembler()
    )
    numbers = codes.view(torch.float8_e4m3fn).double()
    if how == "neighbours":
        expected = numbers.view(64, 16, 32, 2, 2).transpose(2, 3).reshape(64, 16, 2, 64)
        expected = expected.transpose(1, 2)
    else:
        expected = numbers.permute(0, 3, 1, 2)
    assert torch.equal(found.cpu().double(), expected * (2.0**-8 if how == "moved" else 1))


def test_neighbours_are_neighbours_in_a_thread(tmp_path: Path) -> None:
    """The instruction takes elements as a thread has them: in the operand of a product two of one
    key lie beside each other. Compiled, not in this process, which interprets kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_decode_codes", "90"],
        env=process_environment(TRITON_CACHE_DIR=str(tmp_path)),
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for shape, layouts in json.loads(done.stdout).items():
        [layout] = layouts
        assert layout.startswith("#ttg.dot_op<{opIdx = 0,") and "kWidth = 2}" in layout, shape


@pytest.mark.parametrize("casts", [True, False])
@pytest.mark.parametrize("block_n", [16, 64])
@pytest.mark.parametrize(
    ("lengths", "shape"),
    [
        ([20, 0, 16], {"head_dim": 40, "num_heads": 10}),
        ([133], {"head_dim": 16, "block_size": 32, "num_heads": 3, "num_kv_heads": 1}),
        ([160, 12], {"head_dim": 22, "window": 83, "soft_cap": 2.0}),
        ([90, 1], {"head_dim": 18, "block_size": 2, "num_heads": 16}),
        ([65], {"head_dim": 128, "num_heads": 15, "num_kv_heads": 1, "window": 3}),
        ([70, 81], {"head_dim": 256, "block_size": 8, "num_heads": 2}),
    ],
)
def test_decode(
    lengths: list[int],
    shape: dict[str, Any],
    block_n: int,
    casts: bool,
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Check,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tiles that all warps share, and such of which each warp has 16 keys, whose codes a GPU may
    have an instruction for."""
    if not casts:
        monkeypatch.setattr(decode_attention, "casts_codes", lambda _: False)
    problem = Problem(lengths, dtype, device, **shape)
    num_heads = problem.query.shape[1]
    problem.sinks = torch.linspace(-3.0, 2.0, num_heads, device=device)
    config = replace(SMALL, block_n=block_n, fused=bool(problem.window))
    assert_close(*attended(problem, config=config))


@pytest.mark.parametrize(
    ("group", "head_dim", "width", "has_teams"),
    [
        (4, 128, 1, True),
        (4, 128, 4, True),
        (4, 128, 5, False),
        (8, 256, 1, True),
        (1, 512, 1, False),
    ],
)
def test_warps_have_keys_of_their_own(
    group: int, head_dim: int, width: int, has_teams: bool
) -> None:
    """Where their sums fit into registers, tiles are cut for that."""
    assert takes_teams(group * width, head_dim) == has_teams
    for num_rows in (1, 32, 256):
        config = decode_config(num_rows, 8, head_dim, group=group, width=width, itemsize=1)
        assert not has_teams or config.block_n == TEAM_KEYS * config.num_warps


def test_programs_are_large_where_they_fill_their_last_wave_better() -> None:
    """Of 8 heads of keys 66 rows are one wave of large programs, 132 one of small ones."""

    def warps(num_rows: int, head_dim: int = 128, width: int = 1) -> int:
        config = decode_config(num_rows, 8, head_dim, group=4, width=width, itemsize=1)
        return config.num_warps

    rows = [1, 32, 66, 67, 132, 133, 192, 198, 199, 256]
    assert [warps(each) for each in rows] == [4, 4, 4, 2, 2, 4, 4, 4, 2, 2]
    assert warps(32, head_dim=256) == 2 and warps(32, width=4) == 2


@pytest.mark.parametrize("power", [-100, 0, 100])
def test_decode_of_numbers_of_all_sizes(power: int, device: torch.device) -> None:
    """What a kernel keeps in float16 is scaled so that nothing is beyond it: bfloat16 queries and
    keys of any size, values a billion times as large as others, and some that are zero and
    attended to most."""
    problem = Problem([150, 40, 9], torch.bfloat16, device)
    problem.scale *= 4
    problem.query = (problem.query * 2.0**power).contiguous()
    keys, values = problem.kv[:, :, LAYER].unbind(2)
    keys *= 2.0**-power
    values *= torch.exp(7 * torch.randn(*values.shape[:-1], 1)).to(values)
    is_zero = (keys[..., 0] > 0.5) & (torch.rand(keys.shape[:-1]) < 0.5).to(device)
    values.masked_fill_(is_zero[..., None], 0)
    got, expected = attended(problem, config=replace(SMALL, block_n=64))
    largest = expected.abs().amax(-1, keepdim=True)
    assert bool(((got.double() - expected).abs() <= largest * 2**-7).all())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("programs", [1, 12])
def test_decode_of_a_query_that_is_not_finite(
    programs: int, bad: float, device: torch.device
) -> None:
    """Who draws a token sees that there is none, also where all scores are −∞; rows and heads
    beside it are what they are."""
    problem = Problem([150, 40], torch.float16, device)
    keys = problem.kv[:, :, LAYER, 0]
    keys[..., 5] = -1 - keys[..., 5].abs()
    problem.query = problem.query.clone()
    problem.query[0, 1, 5] = bad
    problem.sinks = torch.zeros(4, device=device)
    got, _ = attended(problem, config=replace(SMALL, block_n=64, programs=programs))
    assert got[0, 1].isnan().all()
    got[0, 1] = 0
    assert got.isfinite().all()


@pytest.mark.parametrize(
    ("chunks", "heads", "kv_heads", "head_dim", "block_size", "block_m", "config", "window"),
    [
        ([(37, 21)], 1, 1, 32, 16, 32, PrefillConfig(1, 16, 4, 2), 33),
        ([(40, 9), (0, 3)], 4, 2, 22, 64, 16, PrefillConfig(2, 32, 4, 2), 0),
        ([(20, 20)], 1, 1, 16, 16, 64, PrefillConfig(1, 32, 4, 2, tokens=32), 0),
    ],
)
def test_prefill(
    chunks: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    block_m: int,
    config: PrefillConfig,
    window: int,
    device: torch.device,
    dtype: torch.dtype,
    assert_close: Check,
) -> None:
    case = make_case(chunks, heads, kv_heads, head_dim, block_size, device, dtype)
    case.kv = quantised_pool(case.kv)
    sinks = torch.linspace(-3.0, 2.0, heads, device=device)
    case.check(assert_close, block_m, config, window, soft_cap=3.0, sinks=sinks)


@pytest.mark.parametrize("window", [0, 33])
def test_split_prefill(
    window: int, device: torch.device, dtype: torch.dtype, assert_close: Check
) -> None:
    """Some of the keys are NaN that no token sees."""
    forgotten = max(0, 90 - window + 1) if window else 0
    case = make_case([(90, 3)], 2, 1, 32, 16, device, dtype, forgotten=forgotten)
    case.kv = quantised_pool(case.kv)
    test_split_prefill_attention.check(
        case,
        assert_close,
        ItemConfig(16, 2, 16, 4, 2),
        window=window,
        sinks=torch.linspace(-3.0, 2.0, 2, device=device),
    )


@gpu
@needs_gpu
@pytest.mark.parametrize(
    ("lengths", "block_size", "shape"),
    [
        ([9000, 0, 3, 64] + [700] * 29, 16, test_decode_attention.LLAMA),
        ([1025, 17], 16, {"num_heads": 64, "num_kv_heads": 8, "head_dim": 64, "window": 128}),
        ([1025, 17], 64, {"num_heads": 16, "num_kv_heads": 8, "head_dim": 256, "soft_cap": 5.0}),
        ([1025, 17], 16, {"num_heads": 32, "num_kv_heads": 4, "head_dim": 512}),
        ([1025, 17], 64, {"num_heads": 9, "num_kv_heads": 3, "head_dim": 96}),
    ],
)
def test_decode_of_models(
    lengths: list[int],
    block_size: int,
    shape: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    assert_close: Check,
) -> None:
    problem = Problem(lengths, dtype, device, block_size=block_size, **shape)
    problem.kv = quantised_pool(problem.kv)
    work = problem.work(itemsize=1)
    problem.plan(work)
    first = problem.attend(work)
    assert_close(first, problem.reference())
    for turn in range(20):
        assert torch.equal(problem.attend(work, pdl=turn % 2 == 1), first)


@gpu
@needs_gpu
@pytest.mark.parametrize(
    ("head_dim", "block_size"), [(64, 16), (96, 64), (128, 16), (256, 16), (512, 64)]
)
def test_prefill_of_models(
    head_dim: int,
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
    assert_close: Check,
) -> None:
    """Long chunks and short ones, with and without a window, whole and split."""
    chunks = [(0, 700), (1500, 513), (4000, 20)]
    case = make_case(chunks, 8, 2, head_dim, block_size, device, dtype)
    case.kv = quantised_pool(case.kv)
    for longest, window in ((700, 0), (700, 300), (20, 0)):
        case.check(assert_close, block_m_for(longest, head_dim, dtype.itemsize), window=window)
    few = make_case([(300, 9), (0, 2)], 8, 2, head_dim, block_size, device, dtype)
    few.kv = quantised_pool(few.kv)
    config = item_config(8, 2, head_dim, dtype.itemsize, device, is_float8=True)
    test_split_prefill_attention.check(few, assert_close, config)
