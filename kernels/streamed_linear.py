"""Products of a few rows with small weights on GPUs of compute capability 9.0: codes go from memory
to the registers that tensor cores read, without a detour.

What kernels/small_linear.py computes, of packed codes and 8-bit floats, for up to 16 rows; shapes
that it does not take are that module's. All sums have a fixed order.

Gluon, in which the kernel is written, is experimental: names move between releases of Triton. So
only known ones are used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl

from baton.kernels.overlap import overlap
from baton.kernels.reference import Activation
from baton.kernels.reference_scaled import InputScheme
from baton.kernels.skinny_linear import MAX_PARTIALS, linear_work
from baton.kernels.streamed_linear_jit import streamed_kernel

if TYPE_CHECKING:
    from baton.kernels.small_linear import SmallWeight

MOST_ROWS = 16
_RELEASES = ("3.6", "3.7")
_PROCESSORS = 132
"""Of an H100 or H200."""
_MOST_BYTES_OF_X = 200 * 1024
"""In shared memory, beside what warps exchange there."""
_AHEAD: dict[int, tuple[int, ...]] = {512: (1,), 256: (2, 1), 128: (4, 7, 2, 1)}
"""How many steps are loaded ahead, by the bytes of one: of these that divide all, the first."""
_AHEAD_WITH_OFFSETS: dict[int, tuple[int, ...]] = {128: (4, 2, 1)}
"""Which take registers, too."""


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """How a product is cut.

    block_n: rows of the weight of a tile; with an activation half of them are of the gate.
    step: bytes of a row that a warp takes at a time.
    warps_k, warps_n: that share the columns, and the tile's rows.
    ahead: steps that are loaded before they are needed; it divides those of a tile.
    split_k: programs that share the columns of a tile.
    programs: that take the tiles in turn, for each split; 0: as many as tiles.
    """

    block_n: int
    step: int
    warps_k: int
    warps_n: int = 1
    ahead: int = 2
    split_k: int = 1
    programs: int = 0


def streamed_config(
    rows: int, weight: SmallWeight, dtype: torch.dtype, inputs: InputScheme | None = None
) -> StreamConfig | None:
    """How to multiply so many rows of `dtype`, as was fastest on an H200 for llama-8b's products →
    None: the kernel does not take that, or others may be faster."""
    if not _USABLE or dtype.itemsize != 2 or not _runs_on(weight.codes.device):
        return None
    width, group = weight.codes.shape[1], _group(weight)
    if not weight.is_packed:
        # One row, whose codes are multiplied by codes.
        is_float = weight.codes.dtype == torch.float8_e4m3fn
        if not is_float or inputs is None or inputs.group or group or rows > 1:
            return None
        return _of_one_row(weight.num_out, width, (512, 256, 128), _AHEAD)
    # A warp's bytes of a step are of one group, in either half.
    if inputs is not None or rows > MOST_ROWS or group % 128:
        return None
    if weight.offset is not None and not group:
        return None
    if rows == 1:
        ahead = _AHEAD if weight.offset is None else _AHEAD_WITH_OFFSETS
        return _of_one_row(weight.num_out, width, (128,), ahead)
    return _of_some_rows(weight.num_out, width)


def _of_one_row(
    num_out: int, width: int, steps: tuple[int, ...], all_ahead: dict[int, tuple[int, ...]]
) -> StreamConfig | None:
    """By programs of four warps, some of which a processor has at a time."""
    step = next((step for step in steps if width % (4 * step) == 0), None)
    num_tiles = num_out // 16
    if step is None or num_out % 16 or num_tiles < _PROCESSORS:
        return None
    num_steps = width // (4 * step)
    if step == 128 and num_tiles > 8 * _PROCESSORS and num_steps % 2 == 0:
        # A processor has registers for so many.
        ahead, programs = (4, 3) if 4 in all_ahead[step] and num_steps % 4 == 0 else (2, 4)
        return StreamConfig(16, step, 4, ahead=ahead, programs=programs * _PROCESSORS)
    ahead = next(ahead for ahead in all_ahead[step] if num_steps % ahead == 0)
    return StreamConfig(16, step, 4, ahead=ahead)


def _of_some_rows(num_out: int, width: int) -> StreamConfig | None:
    """The same for all numbers of rows: a row does not depend on others. Each program has all of x,
    or as much of it as its split needs, which is why there are few."""
    x_bytes = 2 * MOST_ROWS * 2 * width
    if x_bytes <= _MOST_BYTES_OF_X and num_out >= 80 * 256:
        config = StreamConfig(256, 128, 1, 16, ahead=2)
    elif x_bytes <= _MOST_BYTES_OF_X and num_out % 128 == 0:
        config = StreamConfig(128, 128, 1, 8, ahead=4, split_k=4)
    elif x_bytes <= 2 * _MOST_BYTES_OF_X:
        config = StreamConfig(64, 128, 2, 4, ahead=4, split_k=2)
    elif x_bytes <= 4 * _MOST_BYTES_OF_X:
        config = StreamConfig(128, 128, 2, 8, ahead=1, split_k=4)
    else:
        return None
    num_tiles, rest = divmod(num_out, config.block_n)
    num_steps, columns = divmod(width, config.split_k * config.warps_k * config.step)
    if rest or columns or num_tiles * config.split_k < 80:
        return None
    if config.split_k > 1 and config.split_k * num_out * MOST_ROWS > MAX_PARTIALS:
        return None
    most = _PROCESSORS * 16 // (config.warps_k * config.warps_n)
    rounds = triton.cdiv(num_tiles * config.split_k, most)
    return replace(
        config,
        ahead=gcd(config.ahead, num_steps),
        programs=triton.cdiv(num_tiles, rounds),
    )


@cache
def _runs_on(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def problem() -> str | None:
    """Why this Triton cannot be used; None: it can."""
    if triton.knobs.runtime.interpret:
        return "Triton's interpreter does not run Gluon"
    if ".".join(triton.__version__.split(".")[:2]) not in _RELEASES:
        known = " and ".join(_RELEASES)
        return f"it is known to compile with Triton {known}, and this is {triton.__version__}"
    return None


_USABLE = problem() is None


def streamed_linear(
    x: Tensor,
    weight: SmallWeight,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    inputs: InputScheme | None = None,
    scale: float = 1.0,
    config: StreamConfig | None = None,
    pdl: bool = False,
) -> Tensor:
    """`small_linear` into `out`, of columns that are in order; a norm, and `inputs`, of one row. A
    norm without `inputs` is of bfloat16: between its weight and the rest x is rounded."""
    codes, rows, width = weight.codes, len(x), weight.codes.shape[1]
    if config is None:
        config = streamed_config(rows, weight, x.dtype, inputs)
    assert config is not None
    assert weight.is_packed or inputs is not None
    assert rows == 1 or (norm_weight is None and inputs is None)
    assert norm_weight is None or inputs is not None or x.dtype == torch.bfloat16
    assert weight.num_out % config.block_n == 0
    assert width % (config.warps_k * config.step * config.split_k * config.ahead) == 0
    block_m = _block_m(rows)
    words, rows_layout, operand, mma = _layouts(config, block_m)
    num_tiles = weight.num_out // config.block_n
    work = None
    if config.split_k > 1:
        work = linear_work(x.device)
        assert num_tiles <= len(work.arrivals)
        assert config.split_k * weight.num_out * max(8, block_m) <= len(work.partials)
    programs = min(num_tiles, config.programs or num_tiles)
    streamed_kernel[(programs, config.split_k)](
        x.contiguous(),
        codes.view(torch.int32),
        weight.scale,
        weight.offset,
        bias,
        norm_weight,
        None if inputs is None else inputs.scale,
        residual,
        out,
        None if work is None else work.partials,
        None if work is None else work.arrivals,
        rows,
        weight.num_out // (1 if activation is None else 2),
        num_tiles,
        *weight.scale.stride(),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        eps,
        # Without a scale the kernel has none.
        None if scale == 1 else scale,
        WIDTH=width,
        NUM_GROUPS=weight.scale.shape[1],
        GROUP=_group(weight),
        IS_PACKED=weight.is_packed,
        MOST=0.0 if inputs is None else inputs.largest_code,
        ACTIVATION=activation,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        STEP=config.step,
        SPLIT_K=config.split_k,
        WARPS_K=config.warps_k,
        AHEAD=config.ahead,
        LOOPS=programs < num_tiles,
        WORDS=words,
        ROWS=rows_layout,
        OPERAND=operand,
        MMA=mma,
        num_warps=config.warps_k * config.warps_n,
        **overlap(x, pdl=pdl),
    )
    return out


def _block_m(rows: int) -> int:
    return 1 if rows == 1 else 8 if rows <= 8 else 16


def _group(weight: SmallWeight) -> int:
    """Numbers with one scale; 0: all of a row."""
    num_groups = weight.scale.shape[1]
    return 0 if num_groups == 1 else weight.num_in // num_groups


@cache
def _layouts(config: StreamConfig, block_m: int) -> tuple[Any, Any, Any, Any]:
    """Of words [warps_k, block_n, step / 4]; of x [block_m, warps_k · step] as it is stored to
    shared memory and as it is loaded from it; of sums [warps_k, block_n, block_m]."""
    step, warps_k, warps_n = config.step, config.warps_k, config.warps_n
    in_n = _bits(warps_n, 16)
    words = gl.DistributedLinearLayout(
        reg_bases=[
            *([0, 0, k] for k in (1, 2, *_bits(step // 64, 16))),
            *([0, n, 0] for n in (8, *_bits(config.block_n // 16 // warps_n, 16 * warps_n))),
        ],
        lane_bases=[[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=[*([0, n, 0] for n in in_n), *([k, 0, 0] for k in _bits(warps_k, 1))],
        block_bases=[],
        shape=[warps_k, config.block_n, step // 4],
    )
    operand = gl.DistributedLinearLayout(
        reg_bases=[
            *([0, k] for k in (1, 2, 4, 8, *_bits(step // 64, 64))),
            *([[8, 0]] if block_m == 16 else []),
        ],
        lane_bases=[[0, 16], [0, 32], *([m if m < block_m else 0, 0] for m in (1, 2, 4))],
        warp_bases=[*([0, 0] for _ in in_n), *([0, k] for k in _bits(warps_k, step))],
        block_bases=[],
        shape=[block_m, warps_k * step],
    )
    num_warps = warps_k * warps_n
    along = min(num_warps, max(1, warps_k * step // 256))
    rows = gl.BlockedLayout([1, 8], [1, 32], [num_warps // along, along], [1, 0])
    mma = gl.NVMMADistributedLayout([2, 0], [warps_k, warps_n, 1], [1, 16, 8])
    return words, rows, operand, mma


def _bits(count: int, unit: int) -> list[int]:
    """unit, 2 · unit, … for each bit of a power of two."""
    return [unit << bit for bit in range(count.bit_length() - 1)]
