"""The table of the torch reference."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from baton.kernels import reference
from baton.kernels.reference import Activation, HeadNorms, Rope
from baton.shared.engine.linear import Linear, LinearSpec, PartReader, Ranks, Split, expand
from baton.shared.engine.operations import Norm

_ALONE = Ranks()


class ReferenceOperations:
    def __init__(self, ranks: Ranks = _ALONE) -> None:
        self.ranks = ranks

    pack_rope = staticmethod(reference.pack_rope)
    take_rope = staticmethod(reference.take_rope)
    rope_and_store = staticmethod(reference.rope_and_store)
    paged_attention = staticmethod(reference.paged_attention)
    soft_cap = staticmethod(reference.soft_cap)

    def load_linear(self, spec: LinearSpec, reader: PartReader) -> Linear:
        layer = self.pack_linear(*expand(spec, reader, self.ranks), spec.scale)
        all_reduce = self.ranks.all_reduce if spec.split is Split.ROWS else None
        return replace(layer, all_reduce=all_reduce)

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Linear:
        num_out, num_in = weight.shape
        return Linear(reference.pack_weight(weight), bias, num_out, num_in, scale=scale)

    def linear(self, x: Tensor, layer: Linear, residual: Tensor | None = None) -> Tensor:
        if layer.all_reduce is None:
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
        return self.linear(reference.rms_norm(x, norm.weight, norm.eps), layer)

    def norm_gate_up(
        self, x: Tensor, norm: Norm, layer: Linear, activation: Activation = "silu"
    ) -> Tensor:
        return reference.activate_and_mul(self.norm_linear(x, norm, layer), activation)

    def activate_and_mul(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        return reference.activate(gate, activation).mul_(up)

    def norm_add(self, x: Tensor, norm: Norm, residual: Tensor) -> Tensor:
        return reference.norm_add(x, norm.weight, norm.eps, residual)

    def rope_query(self, query: Tensor, rope: Rope, norms: HeadNorms | None = None) -> Tensor:
        return reference.rope_query(query, rope, norms)
