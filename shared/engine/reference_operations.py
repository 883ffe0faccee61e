"""The table of the torch reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from baton.kernels import (
    reference,
    reference_conv,
    reference_delta,
    reference_experts,
    reference_gated_norm,
    reference_latent,
    reference_ssd,
)
from baton.kernels.cpu_attention import FusedPlan, fused_attention
from baton.kernels.reference import Activation, AttentionPlan, HeadNorms, Rope
from baton.kernels.reference_experts import ExpertWeights, Routes
from baton.kernels.reference_latent import LatentHeads
from baton.kernels.reference_scaled import quantise_rows_reference
from baton.kernels.reference_ssd import SsdWeights
from baton.kernels.state_plan import StatePlan
from baton.shared.engine.determinism import MIN_LINEAR_ROWS
from baton.shared.engine.experts import Experts, ExpertsSpec, read_experts
from baton.shared.engine.linear import (
    Linear,
    LinearSpec,
    PartReader,
    Ranks,
    Split,
    common_inputs,
    dtype_of,
    expand,
    joined,
    read_bias,
    read_parts,
)
from baton.shared.engine.operations import GatedLinears, Norm
from baton.shared.engine.quantised.kept import Expanding, KeptMatrix, keep
from baton.shared.engine.quantised.small import SmallLinear, pack_small
from baton.shared.engine.quantised.weight import QuantisedWeight

_ALONE = Ranks()


class ReferenceOperations:
    """`keeps_small`: quantised weights are computed as they are stored, where there is a product
    for them; activations are bfloat16 then, and on a CPU. `quantises_inputs`: activations are made
    small where a checkpoint says so, as they are on a GPU: to compare with, not to serve."""

    def __init__(
        self,
        ranks: Ranks = _ALONE,
        *,
        keeps_small: bool = False,
        quantises_inputs: bool = False,
    ) -> None:
        self.ranks = ranks
        self.keeps_small = keeps_small
        self.quantises_inputs = quantises_inputs
        self.keeps_experts = False

    pack_rope = staticmethod(reference.pack_rope)
    take_rope = staticmethod(reference.take_rope)
    rope_and_store = staticmethod(reference.rope_and_store)
    store_kv = staticmethod(reference.store_kv)
    latent_attention = staticmethod(reference_latent.latent_attention)
    soft_cap = staticmethod(reference.soft_cap)
    causal_conv = staticmethod(reference_conv.causal_conv)
    gated_delta = staticmethod(reference_delta.gated_delta)
    gated_norm = staticmethod(reference_gated_norm.gated_norm)
    route = staticmethod(reference_experts.route)
    gated_add = staticmethod(reference_experts.gated_add)

    def load_linear(self, spec: LinearSpec, reader: PartReader) -> Linear:
        all_reduce = self.ranks.all_reduce if spec.split is Split.ROWS else None
        if self.quantises_inputs:
            parts = list(read_parts(spec, reader, self.ranks))
            weight = joined(parts, dtype_of(spec, reader))
            layer = self.pack_linear(weight, read_bias(spec, reader, self.ranks), spec.scale)
            layer = replace(layer, inputs=common_inputs(parts))
        elif self.keeps_small and not spec.is_wide:
            layer = self._load_small(spec, reader)
        else:
            layer = self.pack_linear(*expand(spec, reader, self.ranks), spec.scale)
        return replace(layer, all_reduce=all_reduce)

    def _load_small(self, spec: LinearSpec, reader: PartReader) -> Linear:
        parts = list(read_parts(spec, reader, self.ranks))
        bias = read_bias(spec, reader, self.ranks)
        return self._pack_small(parts, bias, spec.scale, reader.dtype)

    def _pack_small(
        self,
        parts: Sequence[Tensor | QuantisedWeight],
        bias: Tensor | None,
        scale: float,
        dtype: torch.dtype,
    ) -> Linear:
        pieces = pack_small(parts, dtype)
        if pieces is None:
            return self.pack_linear(joined(parts, dtype), bias, scale)
        num_out = sum(part.shape[0] for part in parts)
        num_in = parts[0].shape[1]
        weight = torch.empty(0, dtype=dtype)
        return SmallLinear(weight, bias, num_out, num_in, scale=scale, pieces=pieces)

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Linear:
        num_out, num_in = weight.shape
        return Linear(reference.pack_weight(weight), bias, num_out, num_in, scale=scale)

    def keep_experts_small(self) -> None:
        self.keeps_experts = True

    def load_experts(self, spec: ExpertsSpec, reader: PartReader) -> Experts:
        """What is kept small is expanded whenever a token has the expert: to the numbers, and in
        the form, that it would have been kept in."""
        form, num_bytes = reference.pack_weight, 0
        matrices: tuple[list[Tensor | KeptMatrix], ...] = ([], [])
        biases: tuple[list[Tensor | None], ...] = ([], [])
        for expert in read_experts(spec, reader, self.ranks):
            num_bytes += expert.bias_bytes
            for parts, own in zip((expert.gate_up, expert.down), matrices, strict=True):
                kept = keep(parts) if self.keeps_experts else None
                weight = joined(parts, reader.dtype) if kept is None else kept
                num_bytes += weight.nbytes if isinstance(weight, Tensor) else weight.num_bytes
                own.append(form(weight) if isinstance(weight, Tensor) else weight)
            for bias, each in zip(biases, (expert.gate_up_bias, expert.down_bias), strict=True):
                bias.append(each)
        gate_up, down = (Expanding(each, form, reader.dtype) for each in matrices)
        weights = ExpertWeights(gate_up, down, *biases)
        return Experts(weights, spec.activation, num_bytes, all_reduce=self.ranks.all_reduce)

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
        """In the form that the step was planned for."""
        if isinstance(plan, FusedPlan):
            assert not cap and sinks is None
            return fused_attention(query, kv, layer, plan, scale)
        return reference.paged_attention(query, kv, layer, plan, scale, cap, sinks)

    def rope_and_store_latent(
        self,
        query: Tensor,
        latent: Tensor,
        norm: Norm,
        rope: Rope,
        kv: Tensor,
        layer: int,
        plan: AttentionPlan,
        heads: LatentHeads,
    ) -> Tensor:
        reference_latent.rope_and_store_latent(
            query, latent, norm.weight, norm.eps, rope, kv, layer, plan
        )
        return query

    def ssd(
        self, x: Tensor, dt: Tensor, weights: SsdWeights, state: Tensor, layer: int, plan: StatePlan
    ) -> Tensor:
        """Token by token where the class `exact` is at stake; else in the faster form."""
        may_be_exact = x.dtype == torch.float32 and x.device.type == "cpu"
        form = reference_ssd.ssd if may_be_exact else reference_ssd.ssd_in_chunks
        return form(x, dt, weights, state, layer, plan)

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        return reference.rms_norm(x, norm.weight, norm.eps)

    def linear(self, x: Tensor, layer: Linear, residual: Tensor | None = None) -> Tensor:
        if layer.inputs is not None:
            x = quantise_rows_reference(x, layer.inputs).expand(x.dtype)
        if isinstance(layer, SmallLinear):
            y = layer.product(x)
            if layer.all_reduce is not None:
                layer.all_reduce(y)
            if layer.bias is not None:
                y.add_(layer.bias)
        elif layer.all_reduce is None:
            y = reference.linear(x, layer.weight, layer.bias)
        else:
            y = reference.linear(x, layer.weight, None)
            layer.all_reduce(y)
            if layer.bias is not None:
                y.add_(layer.bias)
        if layer.scale != 1:
            y.mul_(layer.scale)
        return y if residual is None else y.add_(residual)

    def norm_linear(self, x: Tensor, norm: Norm, layer: Linear) -> Tensor:
        return self.linear(self.norm(x, norm), layer)

    def norm_scores(self, x: Tensor, norm: Norm, layer: Linear) -> tuple[Tensor, Tensor]:
        normed = self.norm(x, norm)
        return normed, self.linear(normed.float(), layer)

    def norm_gate_up(
        self, x: Tensor, norm: Norm, layer: Linear, activation: Activation = "silu"
    ) -> Tensor:
        return reference.activate_and_mul(self.norm_linear(x, norm, layer), activation)

    def gated_mlp(
        self,
        x: Tensor,
        norm: Norm,
        mlp: GatedLinears,
        activation: Activation = "silu",
        residual: Tensor | None = None,
    ) -> Tensor:
        return self.linear(self.norm_gate_up(x, norm, mlp.gate_up, activation), mlp.down, residual)

    def activate_and_mul(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        return reference.activate(gate, activation).mul_(up)

    def joins_shared(self, num_tokens: int, layer: Experts, mlp: GatedLinears) -> bool:
        return False

    def experts(
        self,
        x: Tensor,
        routes: Routes,
        layer: Experts,
        residual: Tensor | None = None,
        shared: GatedLinears | None = None,
        shared_gate: Tensor | None = None,
    ) -> Tensor:
        assert shared is None
        y = reference_experts.experts(
            x, routes, layer.weights, layer.activation, min_rows=MIN_LINEAR_ROWS
        )
        if layer.all_reduce is not None:
            layer.all_reduce(y)
        return y.to(x.dtype) if residual is None else residual.add_(y)

    def norm_add(self, x: Tensor, norm: Norm, residual: Tensor) -> Tensor:
        return reference.norm_add(x, norm.weight, norm.eps, residual)

    def rope_query(self, query: Tensor, rope: Rope, norms: HeadNorms | None = None) -> Tensor:
        return reference.rope_query(query, rope, norms)
