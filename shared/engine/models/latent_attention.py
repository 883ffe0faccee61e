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
        rope_dim = own.head_dim
        order = rope_order(own.rope, rope_dim)
        self._unit = unit = latent.key_dim + rope_dim
        latents = [
            Piece("latent", latent.rank, style.qkv_bias),
            Piece("turned_key", rope_dim, style.qkv_bias, order=order),
        ]
        query_name = "query" if latent.query_rank is None else "query_of_latent"
        query = Piece(query_name, own.num_heads * unit, unit=unit, order=_behind(latent, order))
        # What is in front of the latents in their product.
        ahead: Piece | None = None
        self._query_norm = self._query = None
        if latent.query_rank is not None:
            ahead = Piece("query_latent", latent.query_rank, style.qkv_bias)
            module = prefix + names["query_norm"]
            self._query_norm = load.norm(module, latent.query_rank, latent.eps)
        elif load.ops.ranks.size == 1:
            ahead = query
        self._ahead = 0 if ahead is None else ahead.num_out
        own_pieces = latents if ahead is None else [ahead, *latents]
        self._latents = load.linear(
            LinearSpec(config.hidden_size, parts(names, prefix, *own_pieces))
        )
        if ahead is not query:
            query_in = latent.query_rank or config.hidden_size
            spec = LinearSpec(query_in, parts(names, prefix, query), Split.COLUMNS)
            self._query = load.linear(spec)
        self._norm = load.norm(prefix + names["latent_norm"], latent.rank, latent.eps)
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
        """Of norm(hidden [T, hidden]), for `attend` → [T, num_heads, numbers]; stores latents."""
        latents = self._ops.norm_linear(hidden, norm, self._latents)
        ahead = latents[:, : self._ahead]
        if self._query is None:
            query = ahead
        elif self._query_norm is None:
            query = self._ops.norm_linear(hidden, norm, self._query)
        else:
            query = self._ops.norm_linear(ahead, self._query_norm, self._query)
        heads = query.view(len(hidden), -1, self._unit)
        return self._ops.rope_and_store_latent(
            heads,
            latents[:, self._ahead :],
            self._norm,
            rope,
            kv,
            self._place,
            plan,
            self._heads,
        )

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
