"""Attention over latents: one vector of a token in the cache, of which each head makes its key and
its value."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from baton.shared.engine.latent import LatentHeadsSpec
from baton.shared.engine.linear import LinearSpec, Order, Split
from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.models.blocks import Names, Piece, parts
from baton.shared.engine.models.model_config import LatentConfig, ModelConfig
from baton.shared.engine.models.rope_config import rope_order
from baton.shared.engine.operations import Norm


class LatentAttention:
    """As `Attention` to its layer.

    Latents are the same for all ranks, and each rank has some of the heads.
    """

    def __init__(
        self,
        config: ModelConfig,
        latent: LatentConfig,
        load: ModelLoader,
        names: Names,
        prefix: str,
        index: int,
    ) -> None:
        """Of layer `index`. `names`: latent, turned_key (what both are made of the hidden state
        by), latent_norm, heads, output; query, or where queries have a latent query_latent,
        query_norm and query_of_latent."""
        own, style = config.layers[index], config.style
        assert own is not None
        self._ops = load.ops
        _, self._place = load.places[index]
        assert own.scale is not None
        self._scale = own.scale
        rope_dim, self._query_rank = own.head_dim, latent.query_rank or 0
        order = rope_order(own.rope, rope_dim)
        pieces = [Piece("latent", latent.rank, style.qkv_bias)]
        pieces.append(Piece("turned_key", rope_dim, style.qkv_bias, order=order))
        query_in, query_name = config.hidden_size, "query"
        self._query_norm = None
        if latent.query_rank is not None:
            query_in, query_name = latent.query_rank, "query_of_latent"
            pieces.insert(0, Piece("query_latent", query_in, style.qkv_bias))
            module = prefix + names["query_norm"]
            self._query_norm = load.norm(module, query_in, latent.eps)
        self._latents = load.linear(LinearSpec(config.hidden_size, parts(names, prefix, *pieces)))
        self._norm = load.norm(prefix + names["latent_norm"], latent.rank, latent.eps)
        self._unit = unit = latent.key_dim + rope_dim
        query = Piece(query_name, own.num_heads * unit, unit=unit, order=_behind(latent, order))
        self._query = load.linear(LinearSpec(query_in, parts(names, prefix, query), Split.COLUMNS))
        self._heads = load.latent_heads(
            LatentHeadsSpec(
                module=prefix + names["heads"],
                num_heads=own.num_heads,
                key_dim=latent.key_dim,
                value_dim=latent.value_dim,
                rank=latent.rank,
            )
        )
        output = parts(names, prefix, Piece("output", config.hidden_size, style.output_bias))
        size = own.num_heads * latent.value_dim
        self._output = load.linear(LinearSpec(size, output, Split.ROWS, in_unit=latent.value_dim))

    def query(self, hidden: Tensor, norm: Norm, rope: Any, kv: Tensor, plan: Any) -> Tensor:
        """Of norm(hidden [T, hidden]) → [T, num_heads, key_dim + rope_dim]; stores latents."""
        latents = self._ops.norm_linear(hidden, norm, self._latents)
        if self._query_norm is None:
            query = self._ops.norm_linear(hidden, norm, self._query)
        else:
            own = latents[:, : self._query_rank]
            query = self._ops.norm_linear(own, self._query_norm, self._query)
        heads = query.view(len(hidden), -1, self._unit)
        self._ops.rope_and_store_latent(
            heads, latents[:, self._query_rank :], self._norm, rope, kv, self._place, plan
        )
        return heads

    def attend(
        self, query: Tensor, kv: Tensor, plan: Any, residual: Tensor | None = None
    ) -> Tensor:
        """What the queries attend to, projected → [T, hidden], plus the residual of that shape."""
        attended = self._ops.latent_attention(
            query, kv, self._place, plan, self._heads, self._scale
        )
        return self._ops.linear(attended.view(len(query), -1), self._output, residual)


def _behind(latent: LatentConfig, order: Order) -> Order:
    """The order of a head's query, whose end is in that order."""
    if order is None:
        return None
    return (*range(latent.key_dim), *(latent.key_dim + place for place in order))
