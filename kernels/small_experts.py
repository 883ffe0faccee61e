"""Experts whose weights are read as they are stored: what kernels/experts.py multiplies then.

    number = code · scale + offset

Codes are widened in registers, exactly; a run's sum of products is scaled in float32, and nothing
is rounded but the result. Scales that are powers of two are multiplied before, which rounds nothing
either, so that tensor cores add up several runs. Floats of four bits count twice here, so that they
are whole numbers, and their scales half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.small_linear import SmallWeight
from baton.kernels.small_widen_jit import bytes_of, nibbles, twice_fp4

Kind = Literal["int8", "float8", "int4", "fp4"]
_TWICE_FP4 = (0, 1, 2, 3, 4, 6, 8, 12)
_LEAST_BLOCK = 16
_LEAST_CODE, _LARGEST_CODE = 2**-9, 448
"""But for 0: of 8-bit floats."""


@dataclass(frozen=True, slots=True)
class SmallExperts:
    """The matrices [N, K] of all experts of a layer, contiguous."""

    codes: Tensor
    """int8 or float8 [experts, N, K]; of four bits uint8 [experts, N, K / 2]: a byte has those of
    columns k (its lower half) and k + K / 2"""
    scale: Tensor
    """float32 [experts, N, runs]"""
    offset: Tensor | None
    """float32 [experts, N, runs]"""
    num_in: int
    is_fp4: bool = False
    powers: tuple[float, float] | None = None
    """The least and the largest scale, where all are powers of two."""

    @classmethod
    def like(cls, one: SmallWeight, num_experts: int, *, is_fp4: bool) -> SmallExperts:
        """Room for so many of that shape."""

        def room(tensor: Tensor) -> Tensor:
            return tensor.new_empty((num_experts, *tensor.shape))

        return cls(room(one.codes), room(one.scale), None, one.num_in, is_fp4, (math.inf, 0.0))

    def put(self, expert: int, one: SmallWeight, *, is_fp4: bool) -> SmallExperts | None:
        """With it among them, in the same memory; None: it is not stored as the others are. The
        first with offsets makes room for those of all, which are zero where there are none."""
        if (one.codes.dtype, is_fp4) != (self.codes.dtype, self.is_fp4):
            return None
        if one.scale.shape != self.scale.shape[1:]:
            return None
        offset, powers = self.offset, self.powers
        if offset is None and one.offset is not None:
            offset = self.scale.new_zeros(self.scale.shape)
        if not one.codes.is_meta:
            self.codes[expert] = one.codes
            self.scale[expert] = one.scale
            if offset is not None and one.offset is not None:
                offset[expert] = one.offset
            powers = _joined(powers, powers_of_two(one.scale))
        return replace(self, offset=offset, powers=powers)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.codes.shape[:2], self.num_in)

    @property
    def kind(self) -> Kind:
        if self.codes.dtype == torch.uint8:
            return "fp4" if self.is_fp4 else "int4"
        return "int8" if self.codes.dtype == torch.int8 else "float8"

    @property
    def num_runs(self) -> int:
        return self.scale.shape[2]

    @property
    def nbytes(self) -> int:
        offset_bytes = 0 if self.offset is None else self.offset.nbytes
        return self.codes.nbytes + self.scale.nbytes + offset_bytes

    def has_numbers_of(self, dtype: torch.dtype) -> bool:
        """Whether all numbers are such, exactly: codes are, and powers of two move them within its
        range. Then sums of several runs need no scaling."""
        if self.powers is None or self.offset is not None or self.num_runs == 1:
            return False
        least, largest = self.powers
        info = torch.finfo(dtype)
        return least * _LEAST_CODE >= info.tiny and largest * _LARGEST_CODE <= info.max

    def blocks(self, most: int, *, joins_runs: bool, is_a_row: bool) -> tuple[int, int]:
        """Columns of a product, at most so many, a power of two, and how many products are made of
        what is read at a time. A product's columns lie in one run; with `joins_runs` in any number,
        and where there is one row only, in as many as tensor cores have rows for, if runs are
        powers of two."""
        width = self.codes.shape[2]
        run = self.num_in // self.num_runs
        is_power = run & (run - 1) == 0
        if self.num_runs == 1 or (joins_runs and is_power):
            least: int = triton.next_power_of_2(width)
            return min(most, max(_LEAST_BLOCK, least)), 1
        if is_a_row and is_power:
            halves = self.num_in // width
            return min(most, run * (_LEAST_BLOCK // halves)), 1
        block = min(most, run & -run)
        at_once = 1 if is_a_row else most // block
        while width // block % at_once:
            at_once -= 1
        return block, at_once

    def expand(self, expert: int) -> Tensor:
        """The reference: one expert's numbers, float32 [N, K]."""
        codes = self.codes[expert]
        if codes.dtype == torch.uint8:
            both = torch.cat((codes & 0xF, codes >> 4), 1).int()
            levels = torch.tensor(
                (*_TWICE_FP4, *(-each for each in _TWICE_FP4)), device=both.device
            )
            codes = levels[both] if self.is_fp4 else both - 8
        runs = codes.float().view(len(codes), self.num_runs, -1)
        numbers = runs * self.scale[expert][..., None]
        if self.offset is not None:
            numbers = numbers + self.offset[expert][..., None]
        return numbers.view(len(codes), -1)


def powers_of_two(scale: Tensor) -> tuple[float, float] | None:
    """The least and the largest, if all are."""
    if not bool((torch.frexp(scale).mantissa == 0.5).all()):
        return None
    return float(scale.min()), float(scale.max())


def _joined(
    one: tuple[float, float] | None, other: tuple[float, float] | None
) -> tuple[float, float] | None:
    if one is None or other is None:
        return None
    return min(one[0], other[0]), max(one[1], other[1])


@triton.jit
def small_sums(
    x_at, is_real, codes_at, scale_at, offset_at, up_rows, inside,
    NUM_IN: tl.constexpr, NUM_RUNS: tl.constexpr, KIND: tl.constexpr, IS_GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AT_ONCE: tl.constexpr,
    JOINS_RUNS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Products of BLOCK_M rows, x_at [BLOCK_M, BLOCK_K], with BLOCK_N rows of a weight, codes_at
    [BLOCK_K, BLOCK_N], and with those `up_rows` further on. scale_at and offset_at [BLOCK_N]: of
    the rows' first runs. AT_ONCE: how many BLOCK_K columns are read at a time. JOINS_RUNS: what is
    multiplied are numbers, not codes, as `has_numbers_of` allows it."""
    IS_PACKED: tl.constexpr = KIND == "int4" or KIND == "fp4"
    WIDTH: tl.constexpr = NUM_IN // 2 if IS_PACKED else NUM_IN
    RUN: tl.constexpr = NUM_IN // NUM_RUNS
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    ones = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(0, WIDTH, BLOCK_K * AT_ONCE):
        for step in tl.static_range(AT_ONCE):
            begin = first + step * BLOCK_K
            is_x = is_real[:, None]
            is_code = inside[None, :]
            if WIDTH % BLOCK_K != 0:
                is_in = begin + k < WIDTH
                is_x = is_x & is_in[None, :]
                is_code = is_code & is_in[:, None]
            for half in tl.static_range(2 if IS_PACKED else 1):
                x = tl.load(x_at + begin + half * WIDTH, mask=is_x, other=0.0)
                codes = tl.load(codes_at + begin, mask=is_code, other=0)
                weight = _widened(codes, half == 1, x.dtype, KIND, ASM)
                run = begin // RUN + half * (NUM_RUNS // 2)
                if JOINS_RUNS:
                    own = _scales(scale_at + run, begin, inside, WIDTH, RUN, BLOCK_K, BLOCK_N)
                    weight *= own.to(x.dtype)
                    acc = tl.dot(x, weight, acc, input_precision="ieee")
                elif NUM_RUNS == 1:
                    acc = tl.dot(x, weight, acc, input_precision="ieee")
                else:
                    product = tl.dot(x, weight, input_precision="ieee")
                    acc = _add_run(acc, product, x, scale_at, offset_at, run, inside)
                if offset_at is not None and NUM_RUNS == 1:
                    ones += tl.sum(x.to(tl.float32), 1)
                if IS_GATED:
                    codes = tl.load(codes_at + up_rows * WIDTH + begin, mask=is_code, other=0)
                    weight = _widened(codes, half == 1, x.dtype, KIND, ASM)
                    up_run = up_rows * NUM_RUNS + run
                    if JOINS_RUNS:
                        own = _scales(
                            scale_at + up_run, begin, inside, WIDTH, RUN, BLOCK_K, BLOCK_N
                        )
                        weight *= own.to(x.dtype)
                        up_acc = tl.dot(x, weight, up_acc, input_precision="ieee")
                    elif NUM_RUNS == 1:
                        up_acc = tl.dot(x, weight, up_acc, input_precision="ieee")
                    else:
                        product = tl.dot(x, weight, input_precision="ieee")
                        up_acc = _add_run(up_acc, product, x, scale_at, offset_at, up_run, inside)
    if NUM_RUNS == 1:
        acc = _scaled(acc, ones, scale_at, offset_at, 0, inside)
        if IS_GATED:
            up_acc = _scaled(up_acc, ones, scale_at, offset_at, up_rows, inside)
    return acc, up_acc


@triton.jit
def _scales(
    scale_at, begin, inside,
    WIDTH: tl.constexpr, RUN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K, BLOCK_N]: those of a step's numbers, of which scale_at [BLOCK_N] has the first."""
    SPAN: tl.constexpr = BLOCK_K // RUN if BLOCK_K > RUN else 1
    number = tl.arange(0, SPAN)[:, None]
    is_there = inside[None, :] & (begin // RUN + number < WIDTH // RUN)
    scale = tl.load(scale_at[None, :] + number, mask=is_there, other=0.0)
    scale = tl.broadcast_to(scale[:, None, :], [SPAN, BLOCK_K // SPAN, BLOCK_N])
    return scale.reshape([BLOCK_K, BLOCK_N])


@triton.jit
def small_sums_of_a_row(
    x_at, row, codes_at, scale_at, offset_at, up_rows, inside,
    NUM_IN: tl.constexpr, NUM_RUNS: tl.constexpr, KIND: tl.constexpr, IS_GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`small_sums` of one row, whose addresses all rows of x_at [BLOCK_M, BLOCK_K] have; every row
    of the result is that row's. `row` [BLOCK_M] counts.

    Tensor cores multiply 16 rows, and there is one: each row is given x's numbers of another run,
    so that one product has the sums of all runs of a step, each of which has its own scale.
    """
    HALVES: tl.constexpr = 2 if KIND == "int4" or KIND == "fp4" else 1
    WIDTH: tl.constexpr = NUM_IN // HALVES
    RUN: tl.constexpr = NUM_IN // NUM_RUNS
    RUNS: tl.constexpr = NUM_RUNS // HALVES
    SPAN: tl.constexpr = BLOCK_K // RUN if BLOCK_K > RUN else 1
    k = tl.arange(0, BLOCK_K)
    number = row % SPAN
    is_run = row < HALVES * SPAN
    # Of the first step, [BLOCK_M, BLOCK_N].
    first_run = number[:, None] + row[:, None] // SPAN * RUNS
    scale_at = scale_at[None, :] + first_run
    is_scale = is_run[:, None] & inside[None, :]
    up_scale_at = scale_at + up_rows * NUM_RUNS
    if offset_at is not None:
        offset_at = offset_at[None, :] + first_run
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # Scales are read a step ahead: nothing waits for them.
    is_there = is_scale & (number < RUNS)[:, None]
    scale = tl.load(scale_at, mask=is_there, other=0.0)
    up_scale = scale
    if IS_GATED:
        up_scale = tl.load(up_scale_at, mask=is_there, other=0.0)
    for begin in tl.range(0, WIDTH, BLOCK_K):
        is_code = inside[None, :]
        is_in = begin + k < WIDTH
        if WIDTH % BLOCK_K != 0:
            is_code = is_code & is_in[:, None]
        product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up_product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        ones = tl.zeros([BLOCK_M], tl.float32)
        for half in tl.static_range(HALVES):
            is_x = row[:, None] == (k // RUN % SPAN)[None, :] + half * SPAN
            if WIDTH % BLOCK_K != 0:
                is_x = is_x & is_in[None, :]
            x = tl.load(x_at + begin + half * WIDTH, mask=is_x, other=0.0)
            codes = tl.load(codes_at + begin, mask=is_code, other=0)
            weight = _widened(codes, half == 1, x.dtype, KIND, ASM)
            product = tl.dot(x, weight, product, input_precision="ieee")
            if offset_at is not None:
                ones += tl.sum(x.to(tl.float32), 1)
            if IS_GATED:
                codes = tl.load(codes_at + up_rows * WIDTH + begin, mask=is_code, other=0)
                weight = _widened(codes, half == 1, x.dtype, KIND, ASM)
                up_product = tl.dot(x, weight, up_product, input_precision="ieee")
        run = begin // RUN
        if offset_at is not None:
            is_there = is_scale & (number + run < RUNS)[:, None]
            offset = tl.load(offset_at + run, mask=is_there, other=0.0)
            acc += ones[:, None] * offset
            if IS_GATED:
                offset = tl.load(offset_at + up_rows * NUM_RUNS + run, mask=is_there, other=0.0)
                up_acc += ones[:, None] * offset
        acc += product * scale
        run = (begin + BLOCK_K) // RUN
        is_there = is_scale & (number + run < RUNS)[:, None]
        scale = tl.load(scale_at + run, mask=is_there, other=0.0)
        if IS_GATED:
            up_acc += up_product * up_scale
            up_scale = tl.load(up_scale_at + run, mask=is_there, other=0.0)
    return _total(acc, BLOCK_M, BLOCK_N), _total(up_acc, BLOCK_M, BLOCK_N)


@triton.jit
def _total(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.broadcast_to(tl.sum(acc, 0)[None, :], [BLOCK_M, BLOCK_N])


@triton.jit
def _widened(
    codes, UPPER: tl.constexpr, dtype: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr
):
    if KIND == "int4":
        return nibbles(codes, UPPER, dtype, ASM)
    if KIND == "fp4":
        return twice_fp4(codes, UPPER, dtype, ASM)
    return bytes_of(codes, KIND == "float8", dtype, ASM)


@triton.jit
def _add_run(acc, product, x, scale_at, offset_at, run, inside):
    ones = tl.zeros([x.shape[0]], tl.float32)
    if offset_at is not None:
        ones = tl.sum(x.to(tl.float32), 1)
    return acc + _scaled(product, ones, scale_at, offset_at, run, inside)


@triton.jit
def _scaled(product, ones, scale_at, offset_at, run, inside):
    """product · scale + offset · sums of x, of that run."""
    product *= tl.load(scale_at + run, mask=inside, other=0.0)[None, :]
    if offset_at is not None:
        product += ones[:, None] * tl.load(offset_at + run, mask=inside, other=0.0)[None, :]
    return product
