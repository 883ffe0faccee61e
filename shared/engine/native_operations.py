"""The table of a CPU in bfloat16 where native.c is compiled; what it does not know is torch's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.kernels import reference
from baton.kernels.cpu_attention import FusedPlan, fused_attention
from baton.kernels.native import (
    RUN,
    Native,
    NativeWeight,
    NoNative,
    load_native,
    pack_tiles,
    tile_bytes,
)
from baton.kernels.reference import Activation, AttentionPlan, HeadNorms, Rope
from baton.shared.engine.linear import Linear
from baton.shared.engine.operations import GatedLinears, Norm
from baton.shared.engine.quantised.small import stored_alike
from baton.shared.engine.quantised.weight import QuantisedWeight
from baton.shared.engine.reference_operations import ReferenceOperations
from baton.shared.model_files.named import cache_dir
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeLinear(Linear):
    """`weight` is empty; bias and scale are part of `native`."""

    native: NativeWeight | None
    """None: on paper."""
    tile_bytes: int

    @property
    def is_small(self) -> bool:
        return True

    @property
    def num_bytes(self) -> int:
        return self.tile_bytes + 4 * self.num_out * (self.bias is not None)


def native_operations() -> ReferenceOperations:
    """Of bfloat16 on this CPU; torch's, and a log line says why, where there are no others."""
    try:
        return NativeOperations(load_native(cache_dir().parent / "native"))
    except NoNative as problem:
        log_event(
            logger,
            logging.WARNING,
            "layers are computed by torch, whose decode steps take two to three times as long",
            message=str(problem),
        )
        return ReferenceOperations(keeps_small=True)


class NativeOperations(ReferenceOperations):
    """`name`: what it was compiled for."""

    def __init__(self, native: Native) -> None:
        super().__init__(keeps_small=True)
        self._native = native
        self.name = native.name

    def _pack_small(
        self,
        parts: Sequence[Tensor | QuantisedWeight],
        bias: Tensor | None,
        scale: float,
        dtype: torch.dtype,
    ) -> Linear:
        layer = None
        if alike := stored_alike(parts, RUN):
            layer = _pack_native(alike, bias, scale, dtype)
        return layer or super()._pack_small(parts, bias, scale, dtype)

    def linear(self, x: Tensor, layer: Linear, residual: Tensor | None = None) -> Tensor:
        if (native := _of(layer)) is None:
            return super().linear(x, layer, residual)
        return self._native.linear(x, native, residual=residual)

    def norm_linear(self, x: Tensor, norm: Norm, layer: Linear) -> Tensor:
        if (native := _of(layer)) is None:
            return super().norm_linear(x, norm, layer)
        return self._native.linear(x, native, (norm.weight, norm.eps))

    def gated_mlp(
        self,
        x: Tensor,
        norm: Norm,
        mlp: GatedLinears,
        activation: Activation = "silu",
        residual: Tensor | None = None,
    ) -> Tensor:
        gate_up, down = _of(mlp.gate_up), _of(mlp.down)
        if gate_up is None or down is None or activation != "silu":
            return super().gated_mlp(x, norm, mlp, activation, residual)
        of_norm = norm.weight, norm.eps
        return self._native.gated_mlp(x, gate_up, down, of_norm, residual)

    def rope_and_store(
        self,
        qkv: Tensor,
        rope: Rope,
        kv: Tensor,
        layer: int,
        plan: AttentionPlan,
        num_heads: int,
        norms: HeadNorms | None = None,
    ) -> Tensor:
        has_more = norms is not None or rope.query_scale is not None or plan.stored is not None
        if has_more or not isinstance(plan, FusedPlan) or qkv.shape[0] != plan.num_tokens:
            return reference.rope_and_store(qkv, rope, kv, layer, plan, num_heads, norms)
        return self._native.rope_and_store(
            qkv.contiguous(), rope.cos, rope.sin, kv, plan.slots[layer], num_heads
        )

    def paged_attention(
        self,
        query: Tensor,
        kv: Tensor,
        layer: int,
        plan: AttentionPlan,
        scale: float,
        cap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        if not isinstance(plan, FusedPlan):
            return super().paged_attention(query, kv, layer, plan, scale, cap, sinks)
        query = query.contiguous()
        return fused_attention(query, kv, layer, plan, scale, self._native.attend)


def _of(layer: Linear) -> NativeWeight | None:
    return layer.native if isinstance(layer, NativeLinear) else None


def _pack_native(
    parts: Sequence[QuantisedWeight], bias: Tensor | None, scale: float, dtype: torch.dtype
) -> NativeLinear | None:
    num_out, num_in = sum(part.num_out for part in parts), parts[0].num_in
    bits = 4 if max(part.num_bits for part in parts) <= 4 else 8
    native = None
    if not parts[0].is_meta:
        tables = [_codes_and_runs(part) for part in parts]
        codes, scales, offsets = (torch.cat(each) for each in zip(*tables, strict=True))
        native = pack_tiles(codes, scales, offsets, num_bits=bits, bias=bias, times=scale)
        if native is None:
            return None
    return NativeLinear(
        torch.empty(0, dtype=dtype),
        bias,
        num_out,
        num_in,
        scale=scale,
        native=native,
        tile_bytes=tile_bytes(num_out, num_in, bits),
    )


def _codes_and_runs(part: QuantisedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Codes from zero on, uint8 [N, K]; scales and offsets, float32 [N, K / RUN]."""
    wide, runs = part.codes.to(torch.int16), part.num_in // RUN
    least, largest = int(wide.min()), int(wide.max())
    # A power of two is multiplied by without loss.
    even = -(1 << (-least - 1).bit_length()) if least < 0 else 0
    if largest - even < (16 if part.num_bits <= 4 else 256):
        least = even
    scale = part.scale.float()
    rounded = scale.half().float()
    moved = least if part.zero is None else least - part.zero.float()
    offset = moved * rounded
    if part.offset is not None:
        # What rounding takes from a scale is made up for in the middle of the codes.
        middle = (int(wide.min()) + largest) / 2
        offset = offset + part.offset.float() + middle * (scale - rounded)

    def by_run(numbers: Tensor) -> Tensor:
        repeated = numbers.repeat_interleave(runs // numbers.shape[1], 1)
        return repeated.expand(part.num_out, runs)

    return (wide - least).to(torch.uint8), by_run(scale), by_run(offset)
