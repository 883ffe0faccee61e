"""A decode step on a CPU, compiled at start: native.c, and what is given to it.

It needs a C compiler (`cc`, or what CC names) and a CPU with AVX2; with AVX512-VNNI it is faster.
Who has none of them computes with torch. The plain forms are in reference.py and
cpu_small_linear.py; this one makes activations small in front of each product, by runs of 32
numbers, as llama.cpp does.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baton.kernels.cpu_attention import FusedUnits, attend_fused

ROWS, RUN = 16, 32
"""Of a tile, as native.c has them."""
_MOST_DIM = 256
_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
_NEEDED = {"avx2", "fma", "f16c"}
_OTHERS_MAY_WRITE = 0o022
_COMPILE_S = 120
_P, _I64, _I32, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_NORM = (_P, _I32, _F)
_FUNCTIONS: dict[str, tuple[type, ...]] = {
    "native_linear": (_P, _P, _I64, *_NORM, _P, _P, _I32),
    "native_gated_mlp": (_P, _P, _P, _I64, *_NORM, _P, _P, _I32),
    "native_rope_and_store": (*(_P,) * 6, *(_I64,) * 4),
    "native_attention": (*(_P,) * 5, *(_I64,) * 6, _F, _I32),
}


_NEED_NO_MEMORY = {"native_rope_and_store"}


class NoNative(Exception):
    """Why there is none here."""


_HEAD = struct.Struct("<40xQ10xHH2x")
"""Of an ELF file of 64 bits."""


class _Weight(ctypes.Structure):
    _fields_ = (
        ("tiles", _P),
        ("bias", _P),
        ("num_out", _I64),
        ("num_in", _I64),
        ("is_wide", ctypes.c_int32),
        ("scale", _F),
    )


@dataclass(frozen=True, slots=True)
class NativeWeight:
    """[num_out, num_in], and what follows the product."""

    tiles: Tensor
    """uint8 [num_out / ROWS, num_in / RUN, bytes]"""
    bias: Tensor | None
    """float32 [num_out]"""
    num_out: int
    struct: _Weight = field(repr=False)

    @property
    def address(self) -> int:
        return ctypes.addressof(self.struct)

    @property
    def num_bytes(self) -> int:
        return self.tiles.nbytes


def tile_bytes(num_out: int, num_in: int, num_bits: int) -> int:
    """That a weight takes."""
    each = ROWS * (RUN // (2 if num_bits <= 4 else 1) + 4)
    return -(-num_out // ROWS) * (num_in // RUN) * each


def pack_tiles(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor,
    *,
    num_bits: int,
    bias: Tensor | None = None,
    times: float = 1.0,
) -> NativeWeight | None:
    """None: float16 does not hold the scales.

    Args:
        codes: uint8 [N, K], below 16 where `num_bits` is 4.
        scale, offset: float32 [N, K / RUN].
        bias: [N]; times: what results are multiplied by, bias included.
    """
    halves = torch.stack((scale, offset), -1).half()
    off = (halves.float() - torch.stack((scale, offset), -1)).abs()
    # No further away than bfloat16 would be, and an eighth of a code, or what is nothing beside an
    # offset that no code makes up for: of runs of one number, whose scale is zero.
    moved = torch.maximum(scale.abs() / 8, offset.abs() / 1024)
    most = torch.stack((scale.abs() / 256, moved), -1)
    if not bool((off <= most).all()):
        return None
    (num_out, num_in), missing = codes.shape, -codes.shape[0] % ROWS
    codes = torch.nn.functional.pad(codes, (0, 0, 0, missing))
    halves = torch.nn.functional.pad(halves, (0, 0, 0, 0, 0, missing))
    blocks, runs = len(codes) // ROWS, num_in // RUN
    steps = codes.view(blocks, ROWS, runs, 8, 4).permute(0, 2, 3, 1, 4)
    if num_bits <= 4:
        steps = steps[:, :, :4] | (steps[:, :, 4:] << 4)
    of_runs = halves.view(blocks, ROWS, runs, 2).permute(0, 2, 3, 1).contiguous()
    tiles = torch.cat((steps.flatten(2), of_runs.flatten(2).view(torch.uint8)), 2)
    wide_bias = None if bias is None else bias.float().contiguous()
    struct = _Weight(
        tiles.data_ptr(),
        None if wide_bias is None else wide_bias.data_ptr(),
        num_out,
        num_in,
        num_bits > 4,
        times,
    )
    return NativeWeight(tiles, wide_bias, num_out, struct)


class Native:
    """The compiled functions. Activations are bfloat16: ValueError where they are not, or have
    another shape, since C would read whatever lies there. MemoryError: there is none to work in.

    `name`: what bits depend on: for which instructions they were compiled, and by whom.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.name = (ctypes.c_char_p.in_dll(library, "native_name").value or b"").decode()
        for name, arguments in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes = arguments
            if name in _NEED_NO_MEMORY:
                function.restype = None
            else:
                function.restype, function.errcheck = _I32, _check_memory
        self._linear = library.native_linear
        self._gated_mlp = library.native_gated_mlp
        self._rope_and_store = library.native_rope_and_store
        self._attention = library.native_attention

    def linear(
        self,
        x: Tensor,
        weight: NativeWeight,
        norm: tuple[Tensor, float] | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """(norm(x) · weightᵀ + bias) · times + residual: x [T, K] → [T, N], in the residual's
        memory if there is one and its rows lie one after another.

        norm: an RMS norm's weight [K], of bfloat16 or float32, and what is added to the squares.
        """
        x, out = _activations(x, weight.struct.num_in), _room(x, weight, residual)
        self._linear(
            weight.address,
            x.data_ptr(),
            x.shape[0],
            *_norm(norm, x.shape[1]),
            None if residual is None else out.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def gated_mlp(
        self,
        x: Tensor,
        gate_up: NativeWeight,
        down: NativeWeight,
        norm: tuple[Tensor, float] | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`linear` down of silu(gate) · up, where (gate, up) is `linear` of norm(x)."""
        x, out = _activations(x, gate_up.struct.num_in), _room(x, down, residual)
        if gate_up.num_out != 2 * down.struct.num_in:
            raise ValueError(f"{gate_up.num_out} are not twice {down.struct.num_in}")
        self._gated_mlp(
            gate_up.address,
            down.address,
            x.data_ptr(),
            x.shape[0],
            *_norm(norm, x.shape[1]),
            None if residual is None else out.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def rope_and_store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, slots: Tensor, num_heads: int
    ) -> Tensor:
        """As `reference.rope_and_store`, without norms; slots: a layer's of the plan, of all
        tokens."""
        num_tokens, _, head_dim = qkv.shape
        for each in (cos, sin):
            _check(each, (num_tokens, 1, head_dim))
        _check(qkv, (num_tokens, num_heads + 2 * kv.shape[1], head_dim))
        _check(kv, (*kv.shape[:5], head_dim))
        query = qkv.new_empty((num_tokens, num_heads, head_dim))
        self._rope_and_store(
            qkv.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            kv.data_ptr(),
            query.data_ptr(),
            num_tokens,
            num_heads,
            kv.shape[1],
            head_dim,
        )
        return query

    def attend(
        self, query: Tensor, kv: Tensor, layer: int, units: FusedUnits, scale: float
    ) -> Tensor:
        """As `attend_fused`, which it takes for units of several queries, and for heads that are no
        multiple of 16 or more than 256."""
        _, num_kv_heads, _, _, block_size, head_dim = kv.shape
        if units.num_queries > 1 or head_dim % 16 or head_dim > _MOST_DIM:
            return attend_fused(query, kv, layer, units, scale)
        _check(query, (units.num_units, query.shape[1], head_dim))
        _check(kv, kv.shape)
        rows, out = units.rows[layer], torch.empty_like(query)
        self._attention(
            query.data_ptr(),
            kv.data_ptr(),
            rows.data_ptr(),
            units.spans.data_ptr(),
            out.data_ptr(),
            units.num_units,
            num_kv_heads,
            query.shape[1] // num_kv_heads,
            rows.shape[0] // (2 * units.num_units * num_kv_heads),
            block_size,
            head_dim,
            scale,
            torch.get_num_threads(),
        )
        return out


def load_native(folder: Path) -> Native:
    """Compiled, if `folder` does not have it yet.

    Raises:
        NoNative: the CPU, or the compiler, cannot; or others may put files into the folder.
    """
    has = _cpu_flags()
    if not has >= _NEEDED:
        raise NoNative(f"the CPU has no {', '.join(sorted(_NEEDED - has))}")
    words = shlex.split(os.environ.get("CC", "")) or ["cc"]
    compiler = [shutil.which(words[0]) or "", *words[1:]]
    if not compiler[0]:
        raise NoNative(f"there is no C compiler {words[0]} (cc, or what CC names)")
    made_of = (_SOURCE.read_text(), *compiler, *_FLAGS, *sorted(has))
    name = f"native-{hashlib.sha256(chr(0).join(made_of).encode()).hexdigest()[:16]}.so"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        _check_is_own(folder)
        path = folder / name
        if path.exists():
            _check_is_own(path)
        if not path.exists() or not _is_whole(path):
            _compile(compiler, path)
        try:
            return Native(ctypes.CDLL(str(path)))
        except OSError:
            # Whatever became of it since.
            _compile(compiler, path)
            return Native(ctypes.CDLL(str(path)))
    except OSError as error:
        raise NoNative(f"{folder}: {error}") from None


def _is_whole(path: Path) -> bool:
    """Of a file that was cut short some is loaded, and ends the process. The last thing in a
    library is the table of its sections, of which its head tells the place and the size."""
    with path.open("rb") as library:
        head = library.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return False
    table, size, count = _HEAD.unpack(head)
    return bool(path.stat().st_size >= table + size * count)


def _check_memory(is_missing: int, function: Any, arguments: Any) -> None:
    if is_missing:
        raise MemoryError(f"{function.__name__}: no memory to work in")


def _check_is_own(path: Path) -> None:
    """What is loaded runs as this user, and its name can be guessed."""
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & _OTHERS_MAY_WRITE:
        raise NoNative(f"others may write to {path}")


def _compile(compiler: list[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as made:
        output = Path(made) / target.name
        command = [*compiler, *_FLAGS, "-shared", "-fPIC", "-o", str(output), str(_SOURCE), "-lm"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_COMPILE_S
            )
        except subprocess.TimeoutExpired:
            raise NoNative(f"{compiler[0]} takes more than {_COMPILE_S} s") from None
        if done.returncode:
            raise NoNative(f"{compiler[0]} fails: {done.stderr.strip()[-300:]}")
        output.chmod(0o700)
        with output.open("rb") as made_file:
            os.fsync(made_file.fileno())
        # At once, whoever else compiles it.
        output.replace(target)


def _cpu_flags() -> set[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return set()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split()[2:])


def _check(x: Tensor, shape: tuple[int, ...]) -> None:
    if x.dtype != torch.bfloat16 or x.shape != shape or not x.is_contiguous():
        raise ValueError(f"{x.dtype} {list(x.shape)} where bfloat16 {list(shape)} is computed with")


def _activations(x: Tensor, size: int) -> Tensor:
    x = x.contiguous()
    _check(x, (x.shape[0], size))
    return x


def _room(x: Tensor, weight: NativeWeight, residual: Tensor | None) -> Tensor:
    """Where results go, with the residual in it if there is one."""
    shape = (x.shape[0], weight.num_out)
    if residual is None:
        return x.new_empty(shape)
    residual = residual.contiguous()
    _check(residual, shape)
    return residual


def _norm(norm: tuple[Tensor, float] | None, size: int) -> tuple[int | None, bool, float]:
    if norm is None:
        return None, False, 0.0
    weight, eps = norm
    is_wide = weight.dtype == torch.float32
    if not is_wide or weight.shape != (size,):
        _check(weight, (size,))
    return weight.data_ptr(), is_wide, eps
