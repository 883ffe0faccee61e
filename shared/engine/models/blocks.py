"""What layers are made of: attention, gated MLP, and where a checkpoint keeps their weights.

A block that follows a norm takes it along, and adds its result to a residual it is given: the
operations do both within their products. A mixture of experts (mixture.py) is called as `GatedMlp`
is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from baton.kernels.reference import HeadNorms
from baton.shared.engine.linear import LinearSpec, Order, Part, Split, reordered
from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.models.rope_config import rope_order
from baton.shared.engine.operations import GatedLinears, Norm

Names = Mapping[str, str]
"""What a block calls a weight → the checkpoint's module, within the layer or as a whole.

Several may be in one module, one under another in the order in which the block asks for them: with
"q", "k" and "v" all under "self_attn.qkv_proj", a fused projection is a declaration.
"""


@dataclass(frozen=True, slots=True)
class Piece:
    """One of the outputs that a linear layer has side by side, by the block's name for it."""

    name: str
    num_out: int
    has_bias: bool = False
    unit: int = 1
    """Ranks share the outputs in runs of so many."""
    order: Order = None
    """Of the outputs of a run; see `Part`."""
    between: tuple[int, int] | None = None
    """Of a module whose pieces alternate; see `Part`."""


def parts(names: Names, prefix: str, *pieces: Piece) -> tuple[Part, ...]:
    """Where a checkpoint keeps the pieces; `prefix` is the layer's, with a dot."""
    rows = {names[piece.name]: 0 for piece in pieces}
    first = []
    for piece in pieces:
        module = names[piece.name]
        if piece.between is None:
            first.append(rows[module])
            rows[module] += piece.num_out
        else:
            first.append(0)
            rows[module] = piece.num_out // piece.unit * piece.between[0]
    return tuple(
        Part(
            module=prefix + names[piece.name],
            num_out=piece.num_out,
            has_bias=piece.has_bias,
            first=start,
            module_out=rows[names[piece.name]],
            unit=piece.unit,
            order=piece.order,
            between=piece.between,
        )
        for piece, start in zip(pieces, first, strict=True)
    )


def load_norm(config: ModelConfig, load: ModelLoader, module: str, size: int | None = None) -> Norm:
    """A norm as all of a model's are; over the hidden state, or of another size."""
    return load.norm(
        module,
        config.hidden_size if size is None else size,
        config.rms_norm_eps,
        is_wide=config.style.has_wide_norms,
        plus_one=config.style.norm_plus_one,
    )


class Attention:
    """Rotary grouped-query attention over the paged cache, full or in a window.

    Which of the two it is stands in the plan of its cache group. A layer that reads another's keys
    and values makes queries only.
    """

    def __init__(
        self,
        config: ModelConfig,
        load: ModelLoader,
        names: Names,
        prefix: str,
        index: int,
        *,
        num_in: int | None = None,
    ) -> None:
        """Of layer `index`. `names`: q, k, v, output; with norms of heads q_norm and k_norm; with
        sinks sinks. v may be missing: values are what keys are before norm and rotation, then.
        `num_in`: numbers that heads are made of, if not the hidden state's."""
        own, style = config.layers[index], config.style
        assert own is not None
        self._ops = load.ops
        self._has_cache = own.source is None
        _, self._place = load.places[index if own.source is None else own.source]
        self._head_dim = head_dim = own.head_dim
        self._scale = 1 / math.sqrt(head_dim) if own.scale is None else own.scale
        self._soft_cap = own.soft_cap
        q_size, kv_size = own.num_heads * head_dim, own.num_kv_heads * head_dim
        share = load.ops.ranks.share(q_size, head_dim)
        self._num_heads = (share.stop - share.start) // head_dim
        order = rope_order(own.rope, head_dim)
        # Each head's query is before its gate.
        between = (2 * head_dim, 0) if style.has_output_gate else None
        pieces = [Piece("q", q_size, style.qkv_bias, head_dim, order, between)]
        if self._has_cache:
            pieces.append(Piece("k", kv_size, style.qkv_bias, head_dim, order))
        if self._has_cache and "v" in names:
            pieces.append(Piece("v", kv_size, style.qkv_bias, head_dim))
        qkv = parts(names, prefix, *pieces)
        if self._has_cache and "v" not in names:
            qkv = (*qkv, replace(qkv[-1], order=None))
        self._qkv = load.linear(LinearSpec(num_in or config.hidden_size, qkv, Split.COLUMNS))
        self._norms = self._load_norms(config, load, names, prefix, order)
        self._sinks = None
        if style.has_sinks:
            sinks = load.numbers(prefix + names["sinks"], own.num_heads, is_wide=True)
            self._sinks = sinks[share.start // head_dim : share.stop // head_dim]
        output = parts(names, prefix, Piece("output", config.hidden_size, style.output_bias))
        self._output = load.linear(
            LinearSpec(q_size, output, Split.ROWS, in_unit=head_dim, scale=style.residual_scale)
        )

    def _load_norms(
        self, config: ModelConfig, load: ModelLoader, names: Names, prefix: str, order: Order
    ) -> HeadNorms | None:
        if not config.style.has_qk_norm:
            return None

        def weight(name: str) -> Tensor:
            norm = load_norm(config, load, prefix + names[name], self._head_dim)
            return reordered(norm.weight, order)

        return HeadNorms(
            config.rms_norm_eps,
            q=weight("q_norm"),
            k=weight("k_norm") if self._has_cache else None,
            has_value=self._has_cache and config.style.has_value_norm,
        )

    def query(self, hidden: Tensor, norm: Norm | None, rope: Any, kv: Tensor, plan: Any) -> Tensor:
        """Of norm(hidden [T, hidden]) → [T, num_heads, head_dim]; stores keys and values. None:
        hidden is normalised."""
        heads = (
            self._ops.linear(hidden, self._qkv)
            if norm is None
            else self._ops.norm_linear(hidden, norm, self._qkv)
        ).view(hidden.shape[0], -1, self._head_dim)
        if not self._has_cache:
            return self._ops.rope_query(heads, rope, self._norms)
        return self._ops.rope_and_store(
            heads, rope, kv, self._place, plan, self._num_heads, self._norms
        )

    def attend(
        self,
        query: Tensor,
        kv: Tensor,
        plan: Any,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """What the queries attend to, projected → [T, hidden], plus the residual of that shape.

        gate: [T, num_heads · head_dim]; what is projected is multiplied by its sigmoid.
        """
        attended = self._ops.paged_attention(
            query, kv, self._place, plan, self._scale, self._soft_cap, self._sinks
        ).view(query.shape[0], -1)
        if gate is not None:
            attended = self._ops.activate_and_mul(gate, attended, "sigmoid")
        return self._ops.linear(attended, self._output, residual)


class GatedMlp:
    """activation(gate) · up, projected down."""

    def __init__(
        self,
        config: ModelConfig,
        load: ModelLoader,
        names: Names,
        prefix: str,
        *,
        intermediate_size: int | None = None,
        input_scale: float = 1.0,
    ) -> None:
        """`names`: gate, up, down. `intermediate_size`: if it is not the model's. `input_scale`: of
        gate and of up."""
        style, size = config.style, intermediate_size or config.intermediate_size
        self._ops = load.ops
        self._activation = style.activation
        gate_up = parts(
            names, prefix, Piece("gate", size, style.mlp_bias), Piece("up", size, style.mlp_bias)
        )
        self._gate_up = load.linear(
            LinearSpec(config.hidden_size, gate_up, Split.COLUMNS, scale=input_scale)
        )
        down = parts(names, prefix, Piece("down", config.hidden_size, style.mlp_bias))
        self._down = load.linear(LinearSpec(size, down, Split.ROWS, scale=style.residual_scale))

    @property
    def linears(self) -> GatedLinears:
        return GatedLinears(self._gate_up, self._down)

    def __call__(self, hidden: Tensor, norm: Norm, residual: Tensor | None = None) -> Tensor:
        """mlp(norm(hidden)) + residual, [T, hidden] each."""
        return self._ops.gated_mlp(hidden, norm, self.linears, self._activation, residual)
