"""The table of Triton kernels, and what each shape is computed by.

Matrix products of few rows go to our own kernel where a table, measured on the GPU, says that it is
faster than cuBLAS; there the norm before and the activation or residual behind are part of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from baton.kernels import (
    causal_conv,
    expert_routes,
    gated_norm,
    linear_table,
    small_linear,
    ssd_scan,
)
from baton.kernels import experts as experts_kernels
from baton.kernels.decode_attention import paged_decode_attention
from baton.kernels.experts import ExpertWeights
from baton.kernels.float8_widen import widen_stretches
from baton.kernels.gated_delta import gated_delta
from baton.kernels.gated_mul import gated_mul
from baton.kernels.kv_store import store_kv
from baton.kernels.prefill_attention import paged_prefill_attention
from baton.kernels.quantised_rows import quantise_rows
from baton.kernels.reference import Activation, HeadNorms
from baton.kernels.reference_conv import Conv
from baton.kernels.reference_delta import DeltaGates
from baton.kernels.reference_experts import Routes
from baton.kernels.reference_gated_norm import GatedNorm
from baton.kernels.reference_latent import LatentHeads
from baton.kernels.reference_scaled import InputScheme, QuantisedRows
from baton.kernels.reference_ssd import SsdWeights
from baton.kernels.rms_norm import rms_norm, rms_norm_add
from baton.kernels.rope_store import rope_and_store, rope_query
from baton.kernels.routing import RoutingRule
from baton.kernels.scaled_linear import (
    reads_ahead,
    scaled_gated,
    scaled_product,
    takes_activation,
)
from baton.kernels.skinny_linear import skinny_linear
from baton.kernels.soft_cap import soft_cap
from baton.kernels.split_prefill_attention import split_prefill_attention
from baton.kernels.state_plan import DeviceStatePlan
from baton.shared.engine import device_latents
from baton.shared.engine.device_plan import DevicePlan, Rope, WidenedChunks
from baton.shared.engine.experts import Experts, ExpertsSpec, read_experts
from baton.shared.engine.linear import (
    Linear,
    LinearSpec,
    PartReader,
    Ranks,
    Split,
    common_inputs,
    expand,
    joined,
    read_bias,
    read_parts,
)
from baton.shared.engine.operations import GatedLinears, Norm
from baton.shared.engine.quantised.stored import StoredLinear, pack_stored, scaled
from baton.shared.engine.quantised.stored_experts import stack_experts

_SCORED_AT_ONCE = 2**23
"""Products of a router whose norm and scores are one kernel, which reads its weights for each
token."""
_ALONE = Ranks()
_NO_NORMS = HeadNorms(eps=0.0)


class TritonOperations:
    """`use_skinny`: False leaves all matrix products to cuBLAS. `overlaps`: kernels start while the
    one before ends, and wait for its results by themselves (programmatic dependent launch, compute
    capability 9.0). `keeps_small`: quantised weights are read as they are stored; `takes_float8`:
    those of 8-bit floats are, too (compute capability 8.9); `quantises_inputs`: activations are
    made small in front of layers whose checkpoint says so (compute capability 9.0)."""

    def __init__(
        self,
        ranks: Ranks = _ALONE,
        *,
        use_skinny: bool = True,
        overlaps: bool = False,
        keeps_small: bool = False,
        takes_float8: bool = False,
        quantises_inputs: bool = False,
    ) -> None:
        self.ranks = ranks
        self.keeps_small = keeps_small
        self.quantises_inputs = quantises_inputs
        self._takes_float8 = takes_float8
        self.keeps_experts = False
        self._use_skinny = use_skinny
        self._overlaps = overlaps
        self._chosen: dict[tuple[int, int, int, torch.dtype, bool], linear_table.Config | None] = {}

    def load_linear(self, spec: LinearSpec, reader: PartReader) -> Linear:
        if self.keeps_small and not spec.is_wide:
            layer = self._load_stored(spec, reader)
        else:
            layer = self.pack_linear(*expand(spec, reader, self.ranks), spec.scale)
        all_reduce = self.ranks.all_reduce if spec.split is Split.ROWS else None
        return replace(layer, all_reduce=all_reduce)

    def _load_stored(self, spec: LinearSpec, reader: PartReader) -> Linear:
        parts = list(read_parts(spec, reader, self.ranks))
        bias = read_bias(spec, reader, self.ranks)
        stored = pack_stored(parts, takes_float8=self._takes_float8)
        if stored is None:
            weight = joined(parts, reader.dtype)
            bias = None if bias is None else bias.to(weight.device)
            return self.pack_linear(weight, bias, spec.scale)
        inputs = common_inputs(parts) if self.quantises_inputs else None
        if inputs is not None:
            with_inputs = scaled(stored, inputs)
            stored, inputs = (stored, None) if with_inputs is None else (with_inputs, inputs)
        stored = small_linear.by_groups(stored, reader.dtype)
        weight = stored.codes.new_empty(0, dtype=reader.dtype)
        bias = None if bias is None else bias.to(weight.device)
        shape = stored.num_out, stored.num_in
        return StoredLinear(weight, bias, *shape, scale=spec.scale, inputs=inputs, stored=stored)

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Linear:
        num_out, num_in = weight.shape
        return Linear(weight.contiguous(), bias, num_out, num_in, scale=scale)

    def pack_rope(
        self, cos: Tensor, sin: Tensor, dtype: torch.dtype, query_scale: Tensor | None = None
    ) -> Rope:
        return Rope(cos.contiguous(), sin.contiguous(), query_scale)

    def take_rope(self, table: Rope, positions: Tensor) -> Rope:
        """The kernel reads the table by position."""
        return replace(table, positions=positions)

    def norm_scores(self, x: Tensor, norm: Norm, layer: Linear) -> tuple[Tensor, Tensor]:
        if len(x) * layer.weight.numel() <= _SCORED_AT_ONCE:
            return expert_routes.norm_scores(
                x, norm.weight, norm.eps, layer.weight, layer.bias, pdl=self._overlaps
            )
        normed = self.norm(x, norm)
        return normed, self.linear(normed.float(), layer)

    def route(
        self,
        logits: Tensor,
        rule: RoutingRule,
        choice_bias: Tensor | None = None,
        expert_scale: Tensor | None = None,
    ) -> Routes:
        return expert_routes.route(logits, rule, choice_bias, expert_scale, pdl=self._overlaps)

    def gated_add(self, x: Tensor, gate: Tensor, residual: Tensor | None) -> Tensor:
        return experts_kernels.gated_add(x, gate, residual, pdl=self._overlaps)

    def keep_experts_small(self) -> None:
        self.keeps_experts = self.keeps_small

    def load_experts(self, spec: ExpertsSpec, reader: PartReader) -> Experts:
        if self.keeps_experts:
            experts = read_experts(spec, reader, self.ranks)
            small = stack_experts(experts, spec.num_experts, takes_float8=self._takes_float8)
            if small is not None:
                all_reduce = self.ranks.all_reduce
                return Experts(small, spec.activation, small.nbytes, True, all_reduce)
        tensors: list[Tensor | None] = []
        num_bytes = 0
        for index, expert in enumerate(read_experts(spec, reader, self.ranks)):
            expanded = expert.expanded(reader.dtype)
            num_bytes += sum(each.nbytes for each in expanded if each is not None)
            if not tensors:
                tensors = [
                    None if each is None else each.new_empty((spec.num_experts, *each.shape))
                    for each in expanded
                ]
            for whole, own in zip(tensors, expanded, strict=True):
                if whole is not None and own is not None and not own.is_meta:
                    whole[index] = own
        gate_up, down, *biases = tensors
        assert gate_up is not None and down is not None
        weights = ExpertWeights(gate_up, down, *biases)
        return Experts(weights, spec.activation, num_bytes, all_reduce=self.ranks.all_reduce)

    def joins_shared(self, num_tokens: int, layer: Experts, mlp: GatedLinears) -> bool:
        gate_up, down = mlp
        if layer.is_small or gate_up.is_small or down.is_small or self.ranks.size > 1:
            return False
        if (
            gate_up.bias is not None
            or down.bias is not None
            or (gate_up.scale, down.scale) != (1, 1)
        ):
            return False
        size = layer.weights.down.shape[2]
        return experts_kernels.takes_shared(num_tokens, size, down.num_in)

    def experts(
        self,
        x: Tensor,
        routes: Routes,
        layer: Experts,
        residual: Tensor | None = None,
        shared: GatedLinears | None = None,
        shared_gate: Tensor | None = None,
    ) -> Tensor:
        if layer.all_reduce is None:
            return self._experts(x, routes, layer, residual, shared, shared_gate)
        y = self._experts(x, routes, layer, None, shared, shared_gate)
        layer.all_reduce(y)
        return y if residual is None else residual.add_(y)

    def _experts(
        self,
        x: Tensor,
        routes: Routes,
        layer: Experts,
        residual: Tensor | None,
        shared: GatedLinears | None,
        shared_gate: Tensor | None,
    ) -> Tensor:
        weights = None
        if shared is not None:
            weights = experts_kernels.SharedWeights(shared.gate_up.weight, shared.down.weight)
        return experts_kernels.experts(
            x,
            routes,
            layer.weights,
            layer.activation,
            residual,
            shared=weights,
            shared_gate=shared_gate,
            pdl=self._overlaps,
        )

    def rope_and_store_latent(
        self,
        query: Tensor,
        latent: Tensor,
        norm: Norm,
        rope: Rope,
        kv: Tensor,
        layer: int,
        plan: DevicePlan,
        heads: LatentHeads,
    ) -> Tensor:
        return device_latents.rope_and_store(
            query, latent, norm, rope, kv, layer, plan, heads, pdl=self._overlaps
        )

    def latent_attention(
        self,
        query: Tensor,
        kv: Tensor,
        layer: int,
        plan: DevicePlan,
        heads: LatentHeads,
        scale: float,
    ) -> Tensor:
        return device_latents.attend(query, kv, layer, plan, heads, scale, pdl=self._overlaps)

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        return rms_norm(x, norm.weight, norm.eps, pdl=self._overlaps)

    def linear(self, x: Tensor, layer: Linear, residual: Tensor | None = None) -> Tensor:
        weight, bias = layer.weight, layer.bias
        if layer.all_reduce is not None:
            return self._reduced(x, layer, residual)
        if isinstance(layer, StoredLinear):
            return self._stored(x, layer, residual)
        config = self._choose(x, layer, fused=residual is not None)
        if config is not None:
            return skinny_linear(
                x,
                weight,
                bias,
                residual=residual,
                scale=layer.scale,
                out=residual,
                config=config,
                pdl=config.pdl,
            )
        if residual is None:
            return _product(x, weight, bias, layer.scale)
        if bias is not None:
            residual.add_(bias, alpha=layer.scale)
        # In place: the product is added where the residual lies, in float32 before rounding.
        return residual.addmm_(x, weight.t(), alpha=layer.scale)

    def norm_linear(self, x: Tensor, norm: Norm, layer: Linear) -> Tensor:
        if isinstance(layer, StoredLinear):
            return self._norm_stored(x, norm, layer)
        config = self._choose(x, layer, fused=True)
        if config is None:
            return self.linear(rms_norm(x, norm.weight, norm.eps, pdl=self._overlaps), layer)
        return skinny_linear(
            x,
            layer.weight,
            layer.bias,
            norm_weight=norm.weight,
            eps=norm.eps,
            scale=layer.scale,
            config=config,
            pdl=config.pdl,
        )

    def norm_gate_up(
        self, x: Tensor, norm: Norm, layer: Linear, activation: Activation = "silu"
    ) -> Tensor:
        if isinstance(layer, StoredLinear):
            stored, is_plain = layer.stored, layer.bias is None and layer.scale == 1
            if is_plain and small_linear.takes_norm(len(x), stored, x.dtype, layer.inputs):
                return small_linear.small_linear(
                    x,
                    stored,
                    norm_weight=norm.weight,
                    eps=norm.eps,
                    activation=activation,
                    inputs=layer.inputs,
                    pdl=self._overlaps,
                )
            if is_plain and small_linear.takes_activation(len(x), stored, x.dtype, layer.inputs):
                return small_linear.small_linear(
                    self.norm(x, norm), stored, activation=activation, pdl=self._overlaps
                )
            gate_up = self.norm_linear(x, norm, layer)
            return gated_mul(gate_up, activation=activation, pdl=self._overlaps)
        weight, bias = layer.weight, layer.bias
        config = self._choose(x, layer, fused=True)
        if config is not None:
            return skinny_linear(
                x,
                weight,
                bias,
                norm_weight=norm.weight,
                eps=norm.eps,
                activation=activation,
                scale=layer.scale,
                config=config,
                pdl=config.pdl,
            )
        x = rms_norm(x, norm.weight, norm.eps, pdl=self._overlaps)
        config = self._choose(x, layer, fused=False)
        if config is not None:
            return skinny_linear(
                x,
                weight,
                bias,
                activation=activation,
                scale=layer.scale,
                config=config,
                pdl=config.pdl,
            )
        gate_up = _product(x, weight, bias, layer.scale)
        return gated_mul(gate_up, activation=activation, pdl=self._overlaps)

    def activate_and_mul(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        return gated_mul(gate, up, activation=activation, pdl=self._overlaps)

    def norm_add(self, x: Tensor, norm: Norm, residual: Tensor) -> Tensor:
        return rms_norm_add(x, norm.weight, norm.eps, residual, out=residual, pdl=self._overlaps)

    def rope_and_store(
        self,
        qkv: Tensor,
        rope: Rope,
        kv: Tensor,
        layer: int,
        plan: DevicePlan,
        num_heads: int,
        norms: HeadNorms | None = None,
    ) -> Tensor:
        assert rope.positions is not None
        norms = norms or _NO_NORMS
        return rope_and_store(
            qkv,
            rope.cos,
            rope.sin,
            rope.positions,
            plan.slots,
            kv,
            layer,
            num_heads=num_heads,
            query_scale=rope.query_scale,
            q_norm=norms.q,
            k_norm=norms.k,
            value_norm=norms.has_value,
            eps=norms.eps,
            pdl=self._overlaps,
        )

    def rope_query(self, query: Tensor, rope: Rope, norms: HeadNorms | None = None) -> Tensor:
        assert rope.positions is not None
        norms = norms or _NO_NORMS
        return rope_query(
            query,
            rope.cos,
            rope.sin,
            rope.positions,
            query_scale=rope.query_scale,
            q_norm=norms.q,
            eps=norms.eps,
            pdl=self._overlaps,
        )

    def store_kv(
        self, key: Tensor, value: Tensor, kv: Tensor, layer: int, plan: DevicePlan
    ) -> None:
        store_kv(key, value, kv, layer, plan.slots)

    def soft_cap(self, x: Tensor, cap: float) -> Tensor:
        return soft_cap(x, cap, pdl=self._overlaps)

    def causal_conv(
        self, x: Tensor, conv: Conv, state: Tensor, layer: int, plan: DeviceStatePlan
    ) -> Tensor:
        return causal_conv.causal_conv(x, conv, state, layer, plan, pdl=self._overlaps)

    def gated_delta(
        self,
        qkv: Tensor,
        strength: Tensor,
        decay: Tensor,
        gates: DeltaGates,
        state: Tensor,
        layer: int,
        plan: DeviceStatePlan,
    ) -> Tensor:
        return gated_delta(qkv, strength, decay, gates, state, layer, plan, pdl=self._overlaps)

    def ssd(
        self,
        x: Tensor,
        dt: Tensor,
        weights: SsdWeights,
        state: Tensor,
        layer: int,
        plan: DeviceStatePlan,
    ) -> Tensor:
        return ssd_scan.ssd(x, dt, weights, state, layer, plan, pdl=self._overlaps)

    def gated_norm(self, x: Tensor, gate: Tensor, norm: GatedNorm) -> Tensor:
        return gated_norm.gated_norm(x, gate, norm, pdl=self._overlaps)

    def paged_attention(
        self,
        query: Tensor,
        kv: Tensor,
        layer: int,
        plan: DevicePlan,
        scale: float,
        cap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        out = torch.empty_like(query) if plan.attended is None else plan.attended
        num_decode = 0
        if plan.rows is not None and plan.work is not None:
            num_decode = len(plan.rows)
            paged_decode_attention(
                query[:num_decode],
                kv,
                layer,
                plan.rows,
                plan.context_lens,
                plan.block_tables,
                plan.work,
                scale,
                window=plan.window,
                soft_cap=cap,
                sinks=sinks,
                out=out[:num_decode],
                pdl=self._overlaps,
            )
        how: dict[str, Any] = {
            "window": plan.window,
            "soft_cap": cap,
            "sinks": sinks,
            "out": out,
        }
        tables, block_m = plan.block_tables, plan.block_m
        self._attend_chunks(query, kv, layer, tables, plan, scale, block_m, how)
        for chunks in plan.widened:
            widen_stretches(
                kv,
                layer,
                tables,
                chunks.stretches,
                chunks.kv,
                window=plan.window,
                counted=chunks.num_stretches,
                pdl=self._overlaps,
            )
            wide, own = chunks.kv, chunks.block_tables
            self._attend_chunks(query, wide, 0, own, chunks, scale, block_m, how)
        return out

    def _attend_chunks(
        self,
        query: Tensor,
        kv: Tensor,
        layer: int,
        block_tables: Tensor,
        chunks: DevicePlan | WidenedChunks,
        scale: float,
        block_m: int,
        how: dict[str, Any],
    ) -> None:
        """Those in lists of tiles and items."""
        if chunks.tiles is not None:
            paged_prefill_attention(
                query,
                kv,
                layer,
                chunks.tiles,
                block_tables,
                scale,
                block_m=block_m,
                num_tiles=chunks.num_tiles,
                **how,
            )
        if chunks.items is not None:
            split_prefill_attention(
                query,
                kv,
                layer,
                chunks.items.items,
                chunks.items.num_items,
                block_tables,
                chunks.items.work,
                scale,
                pdl=self._overlaps,
                **how,
            )

    def gated_mlp(
        self,
        x: Tensor,
        norm: Norm,
        mlp: GatedLinears,
        activation: Activation = "silu",
        residual: Tensor | None = None,
    ) -> Tensor:
        gate_up, down = mlp
        few = isinstance(gate_up, StoredLinear) and small_linear.takes_norm(
            len(x), gate_up.stored, x.dtype, gate_up.inputs
        )
        if not isinstance(down, StoredLinear) or down.inputs is None or few or down.all_reduce:
            return self.linear(self.norm_gate_up(x, norm, gate_up, activation), down, residual)
        rows = self._gated_rows(x, norm, mlp, down.inputs, activation)
        return self._scaled(rows, down, residual, x.dtype)

    def _gated_rows(
        self,
        x: Tensor,
        norm: Norm,
        mlp: GatedLinears,
        scheme: InputScheme,
        activation: Activation,
    ) -> QuantisedRows:
        """What `norm_gate_up` gives, made small for the product behind it."""
        gate_up, down = mlp
        assert isinstance(down, StoredLinear)
        if (
            isinstance(gate_up, StoredLinear)
            and gate_up.inputs is not None
            and gate_up.bias is None
            and gate_up.scale == 1
            and not scheme.group
            and takes_activation(len(x), gate_up.stored, x.dtype)
        ):
            rows = self._norm_rows(x, norm, gate_up, gate_up.inputs)
            return scaled_gated(
                rows, gate_up.stored, activation, scheme, dtype=x.dtype, pdl=self._overlaps
            )
        both = self.norm_linear(x, norm, gate_up)
        return quantise_rows(
            both,
            scheme,
            activation=activation,
            pdl=self._overlaps,
            is_early=reads_ahead(len(x), down.stored, x.dtype),
        )

    def _norm_rows(
        self, x: Tensor, norm: Norm, layer: StoredLinear, scheme: InputScheme
    ) -> QuantisedRows:
        return quantise_rows(
            x,
            scheme,
            norm_weight=norm.weight,
            eps=norm.eps,
            pdl=self._overlaps,
            is_early=reads_ahead(len(x), layer.stored, x.dtype),
        )

    def _scaled(
        self, rows: QuantisedRows, layer: StoredLinear, residual: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        return scaled_product(
            rows,
            layer.stored,
            layer.bias,
            residual=residual,
            scale=layer.scale,
            dtype=dtype,
            pdl=self._overlaps,
        )

    def _norm_stored(self, x: Tensor, norm: Norm, layer: StoredLinear) -> Tensor:
        if not small_linear.takes_norm(len(x), layer.stored, x.dtype, layer.inputs):
            if layer.inputs is None:
                return self.linear(self.norm(x, norm), layer)
            rows = self._norm_rows(x, norm, layer, layer.inputs)
            return self._scaled(rows, layer, None, x.dtype)
        return small_linear.small_linear(
            x,
            layer.stored,
            layer.bias,
            norm_weight=norm.weight,
            eps=norm.eps,
            inputs=layer.inputs,
            scale=layer.scale,
            pdl=self._overlaps,
        )

    def _stored(self, x: Tensor, layer: StoredLinear, residual: Tensor | None) -> Tensor:
        stored, inputs = layer.stored, layer.inputs
        if inputs is not None and not small_linear.takes_norm(
            len(x), stored, x.dtype, layer.inputs
        ):
            is_early = reads_ahead(len(x), stored, x.dtype)
            rows = quantise_rows(x, inputs, pdl=self._overlaps, is_early=is_early)
            return self._scaled(rows, layer, residual, x.dtype)
        if inputs is not None or len(x) <= small_linear.most_rows(stored):
            return small_linear.small_linear(
                x,
                stored,
                layer.bias,
                residual=residual,
                inputs=inputs,
                scale=layer.scale,
                out=residual,
                pdl=self._overlaps,
            )
        if stored.columns is not None:
            x = x.index_select(1, stored.columns)
        weight = small_linear.expand(stored, x.dtype)
        expanded = Linear(weight, layer.bias, layer.num_out, layer.num_in, scale=layer.scale)
        return self.linear(x, expanded, residual)

    def _reduced(self, x: Tensor, layer: Linear, residual: Tensor | None) -> Tensor:
        """This rank's product, added to the others'; then bias and residual."""
        assert layer.all_reduce is not None
        y = self.linear(x, replace(layer, bias=None, all_reduce=None))
        layer.all_reduce(y)
        if layer.bias is not None:
            y.add_(layer.bias, alpha=layer.scale)
        return y if residual is None else residual.add_(y)

    def _choose(self, x: Tensor, layer: Linear, *, fused: bool) -> linear_table.Config | None:
        key = (x.shape[0], layer.num_out, layer.num_in, x.dtype, fused)
        if key not in self._chosen:
            self._chosen[key] = self._look_up(*key)
        return self._chosen[key]

    def _look_up(
        self, num_rows: int, num_out: int, num_in: int, dtype: torch.dtype, fused: bool
    ) -> linear_table.Config | None:
        if not self._use_skinny:
            return None
        config = linear_table.choose(num_rows, num_out, num_in, dtype, fused=fused)
        if config is not None and config.pdl and not self._overlaps:
            config = replace(config, pdl=False)
        return config


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """(x · weightᵀ + bias) · scale by the library, rounded once."""
    if scale == 1:
        return torch.nn.functional.linear(x, weight, bias)
    if bias is not None:
        return torch.addmm(bias, x, weight.t(), beta=scale, alpha=scale)
    out = x.new_empty(x.shape[0], weight.shape[0])
    # With a beta of zero, what `out` holds is not read.
    return torch.addmm(out, x, weight.t(), beta=0, alpha=scale, out=out)
