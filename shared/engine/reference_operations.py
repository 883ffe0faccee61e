"""The table of the torch reference."""

from __future__ import annotations

from torch import Tensor

from baton.kernels import reference
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

    def load_linear(self, spec: LinearSpec, reader: PartReader) -> Linear:
        weight, bias = expand(spec, reader, self.ranks)
        num_out, num_in = weight.shape
        all_reduce = self.ranks.all_reduce if spec.split is Split.ROWS else None
        return Linear(reference.pack_weight(weight), bias, num_out, num_in, all_reduce)

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        num_out, num_in = weight.shape
        return Linear(reference.pack_weight(weight), bias, num_out, num_in)

    def slice_linear(self, layer: Linear, first: int, end: int) -> Linear:
        weight = layer.weight.to_dense() if layer.weight.is_mkldnn else layer.weight
        bias = None if layer.bias is None else layer.bias[first:end]
        return Linear(
            reference.pack_weight(weight[first:end]),
            bias,
            end - first,
            layer.num_in,
            layer.all_reduce,
        )

    def linear(self, x: Tensor, layer: Linear, residual: Tensor | None = None) -> Tensor:
        if layer.all_reduce is None:
            return reference.linear(x, layer.weight, layer.bias, residual)
        y = reference.linear(x, layer.weight, None)
        layer.all_reduce(y)
        if layer.bias is not None:
            y.add_(layer.bias)
        return y if residual is None else y.add_(residual)

    def norm_linear(self, x: Tensor, norm: Norm, layer: Linear) -> Tensor:
        return reference.norm_linear(x, norm.weight, norm.eps, layer.weight, layer.bias)

    def norm_gate_up(self, x: Tensor, norm: Norm, layer: Linear) -> Tensor:
        return reference.norm_gate_up(x, norm.weight, norm.eps, layer.weight, layer.bias)
