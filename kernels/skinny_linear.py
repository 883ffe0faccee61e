"""Products of a few rows with a large weight, at the speed at which the weight can be read.

Norm before, and activation and residual after the product are part of it, so that a decoder layer
needs few launches. All sums have a fixed order: the same input gives the same bits every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from baton.kernels.linear_table import Config, guess
from baton.kernels.reference import Activation
from baton.kernels.shared_memory import shared_bytes
from baton.kernels.skinny_linear_jit import dot_kernel, fma_kernel

MAX_PARTIALS = 8 * 2**20
_MAX_TILES = 8192


@dataclass(frozen=True, slots=True)
class LinearWork:
    """What programs that share a tile exchange: of one stream at a time.

    partials: float32 [MAX_PARTIALS]; arrivals: int32 [_MAX_TILES], zero between launches.
    """

    partials: Tensor
    arrivals: Tensor


def linear_work(device: torch.device) -> LinearWork:
    """The buffers of the device's current stream, made at its first call: make it before a graph is
    captured. Streams have their own: a draft model's steps run beside those of the model."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _work_of_stream(device, stream)


@cache
def _work_of_stream(device: torch.device, stream: int) -> LinearWork:
    return LinearWork(
        partials=torch.empty(MAX_PARTIALS, dtype=torch.float32, device=device),
        arrivals=torch.zeros(_MAX_TILES, dtype=torch.int32, device=device),
    )


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
    config: Config | None = None,
    pdl: bool = False,
) -> Tensor:
    """f((norm(x) · weightᵀ + bias) · scale) + residual, summed in float32 and rounded once.

    All launches of a device must be on one stream, or on streams that wait for each other.

    Args:
        x: [M, K], M from 1 to about 256; rows may be strided.
        weight: [N, K], contiguous; [gate; up] with an activation.
        bias: [N].
        norm_weight: [K], of any float dtype; if given, norm is RMSNorm with it and `eps`.
        residual: [M, N'] where N' = N / 2 with an activation, else N; rows may be strided.
        activation: f(gate, up) = activation(gate) · up; without it f does nothing.
        scale: of the product and the bias.
        out: [M, N'], may be `residual`, not x; rows may be strided.
        config: how; a guess if not given.
        pdl: launch while the previous kernel still runs; weights must not come from it.

    Returns:
        out, or a new tensor [M, N'] of x's dtype.
    """
    rows, size_k = x.shape
    size_n = weight.shape[0] // (1 if activation is None else 2)
    assert weight.shape[1] == size_k and weight.is_contiguous() and x.stride(1) == 1
    if out is None:
        out = torch.empty((rows, size_n), dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    if config is None:
        config = _config(rows, weight)
    aligned = size_k * x.element_size() % 16 == 0
    pdl = pdl and x.is_cuda
    common: dict[str, Any] = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "norm_ptr": norm_weight,
        "residual_ptr": residual,
        "out_ptr": out,
        "rows": rows,
        "size_n": size_n,
        "size_k": size_k,
        "x_stride": x.stride(0),
        "residual_stride": 0 if residual is None else residual.stride(0),
        "out_stride": out.stride(0),
        "eps": eps,
        # Without a scale the kernel has none, and is the one of a model that never has.
        "scale": None if scale == 1 else scale,
        "ACTIVATION": activation,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "EVEN_N": size_n % config.block_n == 0,
        "EVEN_K": size_k % config.block_k == 0,
        "PDL": pdl,
        "PREFETCH": config.prefetch if aligned else 0,
        "NUM_THREADS": 32 * config.num_warps,
        "num_warps": config.num_warps,
    }
    if pdl:
        common["launch_pdl"] = True
    num_tiles = triton.cdiv(size_n, config.block_n)
    if config.variant == "fma":
        _launch_fma(config, num_tiles, common)
    else:
        _launch_dot(config, num_tiles, common, x.device)
    return out


def _config(rows: int, weight: Tensor) -> Config:
    """Whatever works where nobody has chosen; float32 has no tensor cores and needs small tiles."""
    if weight.element_size() == 4:
        return Config("dot", 32, 32, num_stages=3)
    return guess(rows, *weight.shape) or Config("dot", 64, 64, num_stages=3)


def _launch_fma(config: Config, num_tiles: int, common: dict[str, Any]) -> None:
    assert common["rows"] <= 4 and config.split_k == 1
    fma_kernel[(num_tiles,)](
        **common,
        BLOCK_M=triton.next_power_of_2(common["rows"]),
        STAGES=config.num_stages,
    )


def _launch_dot(
    config: Config, num_tiles: int, common: dict[str, Any], device: torch.device
) -> None:
    rows, size_k, weight = common["rows"], common["size_k"], common["weight_ptr"]
    block_m = config.block_m or min(64, max(16, triton.next_power_of_2(rows)))
    num_tiles *= triton.cdiv(rows, block_m)
    partials, arrivals = None, None
    if config.split_k > 1:
        work = linear_work(device)
        partials, arrivals = work.partials, work.arrivals
        tile_size = block_m * (config.block_n * (1 if common["ACTIVATION"] is None else 2) + 1)
        assert num_tiles <= _MAX_TILES and config.split_k * num_tiles * tile_size <= MAX_PARTIALS
    descriptor = None
    if config.variant == "tma":
        block = [config.block_n, config.block_k]
        descriptor = TensorDescriptor(weight, [*weight.shape], [size_k, 1], block)
    dot_kernel[(num_tiles, config.split_k)](
        **common,
        descriptor=descriptor,
        partial_ptr=partials,
        arrival_ptr=arrivals,
        steps_per_split=triton.cdiv(triton.cdiv(size_k, config.block_k), config.split_k),
        BLOCK_M=block_m,
        SPLIT_K=config.split_k,
        num_stages=_num_stages(config, block_m, common, device),
    )


def _num_stages(config: Config, block_m: int, common: dict[str, Any], device: torch.device) -> int:
    """As configured, or what the device has room for: n stages hold n − 1 of each tile."""
    weight, norm = common["weight_ptr"], common["norm_ptr"]
    weight_rows = config.block_n * (1 if common["ACTIVATION"] is None else 2)
    row_bytes = (weight_rows + block_m) * weight.element_size()
    if norm is not None:
        row_bytes += block_m * norm.element_size()
    room: int = shared_bytes(device) // (row_bytes * config.block_k)
    return max(1, min(config.num_stages, 1 + room))
