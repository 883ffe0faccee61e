"""What all decoders share: embedding, layers one after another, norm and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from baton.shared.engine.linear import LinearSpec, Part
from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.models.blocks import Names
from baton.shared.engine.models.model_config import ModelConfig

Wanted = tuple[Tensor, Sequence[Any]]
"""Which tokens of a step, int [R], and by cache group the plan of these alone."""


class Layer(Protocol):
    """One decoder layer, in two halves: between them, tokens that nobody wants may be left out.

    `rope`, `kv` and `plan` are those of the layer: of its kind of rope and its cache group.
    """

    def query(self, hidden: Tensor, rope: Any, kv: Tensor, plan: Any) -> Tensor:
        """hidden [T, hidden] → [T, num_heads, head_dim]; keys and values go to the cache."""

    def finish(self, hidden: Tensor, query: Tensor, kv: Tensor, plan: Any) -> Tensor:
        """The layer's output [R, hidden], from its input and the queries of the same tokens."""


MakeLayer = Callable[[int], Layer]
"""Given a layer's number."""


class Decoder:
    """The weights and the forward pass; all state is the caller's KV cache."""

    def __init__(
        self, config: ModelConfig, load: ModelLoader, names: Names, make_layer: MakeLayer
    ) -> None:
        self._ops = load.ops
        self.embedding, self._head = _ends(config, load, names)
        self._norm = load.norm(names["norm"], config.hidden_size, config.rms_norm_eps)
        self._group_of = [group for group, _ in load.places]
        self._layers = [make_layer(index) for index in range(config.num_layers)]
        kinds = [(layer.rope, layer.head_dim) for layer in config.layers]
        distinct = list(dict.fromkeys(kinds))
        self._ropes = [load.rope(*kind) for kind in distinct]
        self._rope_of = [distinct.index(kind) for kind in kinds]

    def hidden_states(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_caches: Sequence[Tensor],
        plans: Sequence[Any],
        wanted: Wanted | None = None,
    ) -> Tensor:
        """Runs all layers and stores the tokens' KV → [T, hidden], for `logits`.

        With `wanted`, [R, hidden] of those tokens only: of the others the last layer computes keys
        and values, and nothing that no layer is there to read.

        Args:
            input_ids, positions: int32 or int64 [T].
            kv_caches: by cache group, [blocks + 1, num_kv_heads, num_layers, 2, block_size,
                head_dim].
            plans: by cache group, where the step's tokens are stored and what they attend to.
        """
        ropes = [self._ops.take_rope(table, positions) for table in self._ropes]
        hidden = self.embedding.index_select(0, input_ids)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            group = self._group_of[index]
            kv, plan = kv_caches[group], plans[group]
            query = layer.query(hidden, ropes[self._rope_of[index]], kv, plan)
            if wanted is not None and index == last:
                tokens, plans = wanted
                if not len(tokens):
                    return hidden[:0]
                query, hidden = query.index_select(0, tokens), hidden.index_select(0, tokens)
                plan = plans[group]
            hidden = layer.finish(hidden, query, kv, plan)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden] of `hidden_states` → [R, vocab]."""
        return self._ops.norm_linear(hidden, self._norm, self._head)


def _ends(config: ModelConfig, load: ModelLoader, names: Names) -> tuple[Tensor, Any]:
    """The embedding and the head."""
    size = (config.vocab_size, config.hidden_size)
    if not config.tie_word_embeddings:
        head = LinearSpec(config.hidden_size, (Part(names["head"], config.vocab_size),))
        return load.embedding(names["embedding"], *size), load.linear(head)
    # Of two names for one tensor, files may have kept either.
    module = names["embedding"]
    if load.header(f"{module}.weight") is None and load.header(f"{names['head']}.weight"):
        module = names["head"]
    embedding = load.embedding(module, *size)
    return embedding, load.tied_head(names["head"], embedding)
