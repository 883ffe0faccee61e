"""Products of 8-bit floats that are added to what is there, by cuBLASLt itself.

torch._scaled_mm calls the same library, but cannot have a product added to a residual: another
kernel reads both and writes the sum. The library adds where it writes a product anyway. What it
does not take is computed by the two kernels (scaled_linear.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from baton.kernels.reference_scaled import QuantisedRows
from baton.kernels.small_linear import SmallWeight

# Of cublasLt.h, cublas_api.h and library_types.h. A matrix is described column by column there, so
# a product is that of the weight's rows with the rows of x.
_FLOAT32, _BFLOAT16, _FLOAT8 = 0, 14, 28
_SUMS_IN_FLOAT32 = 68
_DESC_BYTES, _LAYOUT_BYTES, _PREFERENCE_BYTES = 256, 64, 64
_TRANSPOSED_A, _SCALE_A, _SCALE_B, _FAST_SUMS, _MODE_A, _MODE_B = 3, 17, 18, 25, 31, 32
_SCALES_OF_ROWS, _SCALES_OF_RUNS, _SCALES_OF_BLOCKS = 3, 4, 5
_MOST_WORKSPACE, _ALIGNMENTS = 1, (5, 6, 7, 8)
_OLDEST = 120_900
"""The release with scales of rows and of blocks: an older one may not know that it has none."""
_ALIGNED = 16
"""Bytes: what pointers and rows are multiples of."""

_Status = int
_Function = Callable[..., _Status]


class _Found(ctypes.Structure):
    """An algorithm, and what is known of it."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("num_waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """How products of a shape are computed."""

    weight: Any
    x: Any
    residual: Any
    found: _Found


def add_product(
    x: QuantisedRows, weight: SmallWeight, residual: Tensor, *, scale: float = 1.0
) -> bool:
    """residual += (x · weightᵀ) · scale. What the library adds is rounded before, as it was by two
    kernels (seen on an H200 with cuBLASLt 13.1: the same bits).

    Args:
        x: [M, K] of 8-bit floats, a scale a row, or one for each 128 numbers, as the weight's
            blocks have.
        weight: [N, K]; K and N multiples of 16, K of 512 where blocks have scales.
        residual: bfloat16 [M, N]; rows may be strided.

    Returns:
        False: the library does not do this, and nothing was done.
    """
    codes, num_out = x.codes, weight.num_out
    pointers = codes.data_ptr(), weight.codes.data_ptr(), residual.data_ptr()
    stride = residual.stride(0)
    is_aligned = not any(each % _ALIGNED for each in (*pointers, 2 * stride))
    if not codes.is_cuda or x.num_padding or residual.dtype != torch.bfloat16 or not is_aligned:
        return False
    has_blocks = weight.rows_per_scale > 1
    plan = _plan(codes.device, *codes.shape, num_out, stride, has_blocks=has_blocks)
    if plan is None:
        return False
    library = _library(codes.device)
    assert library is not None
    product = _describe(library, weight.scale.data_ptr(), x.scale.data_ptr(), has_blocks=has_blocks)
    assert product is not None
    status = library.multiply(
        product,
        ctypes.byref(ctypes.c_float(scale)),
        ctypes.c_void_p(pointers[1]),
        plan.weight,
        ctypes.c_void_p(pointers[0]),
        plan.x,
        ctypes.byref(ctypes.c_float(1.0)),
        ctypes.c_void_p(pointers[2]),
        plan.residual,
        ctypes.c_void_p(pointers[2]),
        plan.residual,
        plan.found.algorithm,
        None,
        ctypes.c_size_t(0),
        ctypes.c_void_p(torch.cuda.current_stream(codes.device).cuda_stream),
    )
    if status:
        raise RuntimeError(f"cuBLASLt did not multiply {(*codes.shape, num_out)}: status {status}")
    return True


class _Library:
    """Its functions, for one device; all return a status, zero for success."""

    def __init__(self, functions: ctypes.CDLL, handle: ctypes.c_void_p) -> None:
        self._handle = handle
        self._multiply = functions.cublasLtMatmul
        self._find = functions.cublasLtMatmulAlgoGetHeuristic
        self.describe: _Function = functions.cublasLtMatmulDescInit_internal
        self.set_desc: _Function = functions.cublasLtMatmulDescSetAttribute
        self.lay_out: _Function = functions.cublasLtMatrixLayoutInit_internal
        self.prefer: _Function = functions.cublasLtMatmulPreferenceInit_internal
        self.set_preference: _Function = functions.cublasLtMatmulPreferenceSetAttribute

    def multiply(self, *arguments: Any) -> _Status:
        return int(self._multiply(self._handle, *arguments))

    def find(self, *arguments: Any) -> _Status:
        return int(self._find(self._handle, *arguments))


@cache
def _library(device: torch.device) -> _Library | None:
    """None: there is no such library here."""
    try:
        # torch has loaded it.
        functions = ctypes.CDLL(f"libcublasLt.so.{(torch.version.cuda or '').split('.')[0]}")
        functions.cublasLtGetVersion.restype = ctypes.c_size_t
        if functions.cublasLtGetVersion() < _OLDEST:
            return None
        handle = ctypes.c_void_p()
        with torch.cuda.device(device):
            status = functions.cublasLtCreate(ctypes.byref(handle))
        return None if status else _Library(functions, handle)
    except (OSError, AttributeError):
        return None


@lru_cache(maxsize=1024)
def _plan(
    device: torch.device, rows: int, size_k: int, size_n: int, stride: int, *, has_blocks: bool
) -> _Plan | None:
    """None: the library does not do this. `stride`: of the residual's rows."""
    library = _library(device)
    if library is None:
        return None
    # Which scales they will be does not matter yet, but there must be some.
    anywhere = torch.empty(1, device=device).data_ptr()
    product = _describe(library, anywhere, anywhere, has_blocks=has_blocks)
    weight = _layout(library, _FLOAT8, size_k, size_n, size_k)
    x = _layout(library, _FLOAT8, size_k, rows, size_k)
    residual = _layout(library, _BFLOAT16, size_n, rows, stride)
    preference = _preference(library)
    if product is None or weight is None or x is None or residual is None or preference is None:
        return None
    found, count = _Found(), ctypes.c_int()
    status = library.find(
        product,
        weight,
        x,
        residual,
        residual,
        preference,
        ctypes.c_int(1),
        ctypes.byref(found),
        ctypes.byref(count),
    )
    if status or count.value < 1 or found.status:
        return None
    return _Plan(weight, x, residual, found)


def _describe(
    library: _Library, scale_of_weight: int, scale_of_x: int, *, has_blocks: bool
) -> Any | None:
    """A product; None: the library knows no such one."""
    of_weight, of_x = _SCALES_OF_ROWS, _SCALES_OF_ROWS
    if has_blocks:
        of_weight, of_x = _SCALES_OF_BLOCKS, _SCALES_OF_RUNS
    product = (ctypes.c_uint64 * (_DESC_BYTES // 8))()
    status = library.describe(
        product,
        ctypes.c_size_t(_DESC_BYTES),
        ctypes.c_int(_SUMS_IN_FLOAT32),
        ctypes.c_int(_FLOAT32),
    )
    for attribute, number in (
        (_TRANSPOSED_A, ctypes.c_int32(1)),
        # With scales of blocks there are no fast ones.
        (_FAST_SUMS, ctypes.c_int8(not has_blocks)),
        (_MODE_A, ctypes.c_int32(of_weight)),
        (_MODE_B, ctypes.c_int32(of_x)),
        (_SCALE_A, ctypes.c_void_p(scale_of_weight)),
        (_SCALE_B, ctypes.c_void_p(scale_of_x)),
    ):
        status = status or _set(library.set_desc, product, attribute, number)
    return None if status else product


def _layout(library: _Library, dtype: int, rows: int, columns: int, stride: int) -> Any | None:
    layout = (ctypes.c_uint64 * (_LAYOUT_BYTES // 8))()
    status = library.lay_out(
        layout,
        ctypes.c_size_t(_LAYOUT_BYTES),
        ctypes.c_int(dtype),
        ctypes.c_uint64(rows),
        ctypes.c_uint64(columns),
        ctypes.c_int64(stride),
    )
    return None if status else layout


def _preference(library: _Library) -> Any | None:
    """Of algorithms that need no memory beside their matrices."""
    preference = (ctypes.c_uint64 * (_PREFERENCE_BYTES // 8))()
    status = library.prefer(preference, ctypes.c_size_t(_PREFERENCE_BYTES))
    numbers: list[tuple[int, Any]] = [(_MOST_WORKSPACE, ctypes.c_uint64(0))]
    numbers += [(each, ctypes.c_uint32(_ALIGNED)) for each in _ALIGNMENTS]
    for attribute, number in numbers:
        status = status or _set(library.set_preference, preference, attribute, number)
    return None if status else preference


def _set(function: _Function, described: Any, attribute: int, number: Any) -> _Status:
    size = ctypes.c_size_t(ctypes.sizeof(number))
    return function(described, ctypes.c_int(attribute), ctypes.byref(number), size)
