"""What layers are made of: attention, gated MLP, and where a checkpoint keeps their weights.

A block that follows a norm takes it along, and adds its result to the hidden states it was given:
the operations do both within their products. A mixture of experts joins here as one more block with
the call of `GatedMlp`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from baton.shared.engine.linear import LinearSpec, Part, Split
from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.models.model_config import AttentionConfig
from baton.shared.engine.operations import Norm

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


def parts(names: Names, prefix: str, *pieces: Piece) -> tuple[Part, ...]:
    """Where a checkpoint keeps the pieces; `prefix` is the layer's, with a dot."""
    rows = {names[piece.name]: 0 for piece in pieces}
    first = []
    for piece in pieces:
        module = names[piece.name]
        first.append(rows[module])
        rows[module] += piece.num_out
    return tuple(
        Part(
            module=prefix + names[piece.name],
            num_out=piece.num_out,
            has_bias=piece.has_bias,
            first=start,
            module_out=rows[names[piece.name]],
            unit=piece.unit,
        )
        for piece, start in zip(pieces, first, strict=True)
    )


class Attention:
    """Rotary grouped-query attention over the paged cache, full or in a window.

    Which of the two it is stands in the plan of its cache group.
    """

    def __init__(
        self,
        config: AttentionConfig,
        load: ModelLoader,
        names: Names,
        prefix: str,
        place: int,
        *,
        hidden_size: int,
        qkv_bias: bool = False,
        output_bias: bool = False,
    ) -> None:
        """`names`: q, k, v, output. `place`: among the layers of a block of its cache group."""
        self._ops = load.ops
        self._place = place
        self._head_dim = head_dim = config.head_dim
        self._scale = 1 / math.sqrt(head_dim)
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        own = load.ops.ranks.share(q_size, head_dim)
        self._num_heads = (own.stop - own.start) // head_dim
        qkv = parts(
            names,
            prefix,
            Piece("q", q_size, qkv_bias, head_dim),
            Piece("k", kv_size, qkv_bias, head_dim),
            Piece("v", kv_size, qkv_bias, head_dim),
        )
        self._qkv = load.linear(LinearSpec(hidden_size, qkv, Split.COLUMNS))
        output = parts(names, prefix, Piece("output", hidden_size, output_bias))
        self._output = load.linear(LinearSpec(q_size, output, Split.ROWS, in_unit=head_dim))

    def query(self, hidden: Tensor, norm: Norm, rope: Any, kv: Tensor, plan: Any) -> Tensor:
        """Of norm(hidden [T, hidden]) → [T, num_heads, head_dim]; stores keys and values."""
        qkv = self._ops.norm_linear(hidden, norm, self._qkv).view(len(hidden), -1, self._head_dim)
        return self._ops.rope_and_store(qkv, rope, kv, self._place, plan, self._num_heads)

    def attend(self, hidden: Tensor, query: Tensor, kv: Tensor, plan: Any) -> Tensor:
        """hidden + what the queries of the same tokens attend to."""
        attended = self._ops.paged_attention(query, kv, self._place, plan, self._scale)
        return self._ops.linear(attended.view(len(hidden), -1), self._output, hidden)


class GatedMlp:
    """silu(gate) · up, projected down."""

    def __init__(
        self,
        load: ModelLoader,
        names: Names,
        prefix: str,
        *,
        hidden_size: int,
        intermediate_size: int,
        has_bias: bool = False,
    ) -> None:
        """`names`: gate, up, down."""
        self._ops = load.ops
        gate_up = parts(
            names,
            prefix,
            Piece("gate", intermediate_size, has_bias),
            Piece("up", intermediate_size, has_bias),
        )
        self._gate_up = load.linear(LinearSpec(hidden_size, gate_up, Split.COLUMNS))
        down = parts(names, prefix, Piece("down", hidden_size, has_bias))
        self._down = load.linear(LinearSpec(intermediate_size, down, Split.ROWS))

    def __call__(self, hidden: Tensor, norm: Norm) -> Tensor:
        """hidden + mlp(norm(hidden))"""
        x = self._ops.norm_gate_up(hidden, norm, self._gate_up)
        return self._ops.linear(x, self._down, hidden)
