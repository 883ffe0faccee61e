"""What all decoders share: embedding, layers one after another, norm and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from baton.shared.engine.executor import Between, Halfway, Taps, Wanted
from baton.shared.engine.linear import LinearSpec, Part
from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.models.blocks import Names, load_norm
from baton.shared.engine.models.layers import PreNormLayer, SandwichLayer
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.operations import Norm


class Layer(Protocol):
    """One decoder layer, in two halves: between them, tokens that nobody wants may be left out.

    `rope`, `kv` and `plan` are those of the layer: of its kind of rope and its cache group. Of a
    layer that attends and keeps a state, too, `kv` and `plan` are pairs, the attention's first; of
    one that does neither they are None.
    """

    def query(self, hidden: Tensor, rope: Any, kv: Any, plan: Any) -> Tensor:
        """hidden [T, hidden] → [T, num_heads, head_dim], or [T, …] of whatever else the second half
        needs; keys and values, or states, go to the cache."""

    def finish(
        self, hidden: Tensor, query: Tensor, kv: Any, plan: Any, extra: Tensor | None = None
    ) -> Tensor:
        """The layer's output [R, hidden], from its input and the queries of the same tokens.

        `extra`: what `ExtraInputs` has for the layer, of the same tokens.
        """


MakeLayer = Callable[[int], Layer]
"""Given a layer's number."""

ExtraInputs = Callable[[Tensor, Tensor], Tensor]
"""Of token ids [T] and embeddings [T, hidden], scaled: what each layer gets of a token beside its
input, [T, num_layers, any size]."""


class Decoder:
    """The weights and the forward pass; all state is the caller's KV cache."""

    def __init__(
        self,
        config: ModelConfig,
        load: ModelLoader,
        names: Names,
        make_layer: MakeLayer,
        extra_inputs: ExtraInputs | None = None,
    ) -> None:
        self._ops = load.ops
        self._soft_cap = config.logits_soft_cap
        self._extra_inputs = extra_inputs
        self._embedding_scale = rounded(config.embedding_scale, load.dtype)
        self.embedding, self._head = _ends(config, load, names)
        self._norm = load_norm(config, load, names["norm"])
        self._groups_of = [_groups_of(index, config, load) for index in range(config.num_layers)]
        self.last_to_store = max(
            index
            for index, layer in enumerate(config.layers)
            if self._groups_of[index] and (layer is None or layer.source is None)
        )
        self._layers = [make_layer(index) for index in range(config.num_layers)]
        kinds = [None if layer is None else (layer.rope, layer.head_dim) for layer in config.layers]
        distinct = [kind for kind in dict.fromkeys(kinds) if kind is not None]
        self._ropes = [load.rope(*kind) for kind in distinct]
        self._rope_of = [None if kind is None else distinct.index(kind) for kind in kinds]

    def hidden_states(
        self,
        input_ids: Tensor,
        positions: Tensor,
        caches: Sequence[Any],
        plans: Sequence[Any],
        wanted: Wanted | None = None,
        *,
        taps: Taps | None = None,
    ) -> Tensor:
        """Runs all layers and stores the tokens' KV → [T, hidden], for `logits`.

        With `wanted`, [R, hidden] of those tokens only: of the others nothing is computed behind
        the last keys and values, or states, that are stored.

        Args:
            input_ids, positions: int32 or int64 [T].
            caches: by cache group, as `KvCache.caches`.
            plans: by cache group, where the step's tokens are stored and what they attend to, or
                which slots their rows have.
            taps: filled on the way; with `wanted`, as far as all tokens go.
        """
        halfway = self.begin(input_ids, positions, caches, plans, taps=taps)
        if wanted is not None:
            tokens, plans = wanted
            if not len(tokens):
                return halfway.hidden[:0]
            halfway, taps = halfway.at(tokens), None
        return self.finish(halfway, caches, plans, taps)

    def begin(
        self,
        input_ids: Tensor,
        positions: Tensor,
        caches: Sequence[Any],
        plans: Sequence[Any],
        between: Between | None = None,
        *,
        taps: Taps | None = None,
    ) -> Halfway:
        """As far as anything is stored; arguments as of `hidden_states`."""
        ropes = self._take_ropes(positions)
        hidden = self._embed(input_ids)
        extra = None if self._extra_inputs is None else self._extra_inputs(input_ids, hidden)
        for index in range(self.last_to_store):
            if taps is not None:
                taps.take(index, hidden)
            own = None if extra is None else extra[:, index]
            hidden = self._run(index, hidden, ropes, caches, plans, own)
            if between is not None:
                between(index + 1, self.last_to_store)
        if taps is not None:
            taps.take(self.last_to_store, hidden)
        layer, groups, rope = self._parts_of(self.last_to_store)
        query = layer.query(hidden, _of_kind(ropes, rope), _of(caches, groups), _of(plans, groups))
        return Halfway(query, hidden, positions, extra)

    def finish(
        self,
        halfway: Halfway,
        caches: Sequence[Any],
        plans: Sequence[Any],
        taps: Taps | None = None,
    ) -> Tensor:
        """The rest of the layers, of tokens as they are after `begin` → [R, hidden]. `plans`, and
        `taps`: of these tokens alone."""
        query, hidden, positions, extra = halfway
        first = self.last_to_store
        layer, groups, _ = self._parts_of(first)
        own = None if extra is None else extra[:, first]
        hidden = layer.finish(hidden, query, _of(caches, groups), _of(plans, groups), own)
        if first + 1 < len(self._layers):
            ropes = self._take_ropes(positions)
        for index in range(first + 1, len(self._layers)):
            if taps is not None:
                taps.take(index, hidden)
            own = None if extra is None else extra[:, index]
            hidden = self._run(index, hidden, ropes, caches, plans, own)
        if taps is not None:
            taps.take(len(self._layers), hidden)
        return hidden

    def _run(
        self,
        index: int,
        hidden: Tensor,
        ropes: Sequence[Any],
        caches: Sequence[Any],
        plans: Sequence[Any],
        extra: Tensor | None,
    ) -> Tensor:
        """A whole layer."""
        layer, groups, rope = self._parts_of(index)
        kv, plan = _of(caches, groups), _of(plans, groups)
        query = layer.query(hidden, _of_kind(ropes, rope), kv, plan)
        return layer.finish(hidden, query, kv, plan, extra)

    def _parts_of(self, index: int) -> tuple[Layer, list[int], int | None]:
        """A layer, its cache groups and its kind of rope."""
        return self._layers[index], self._groups_of[index], self._rope_of[index]

    def _take_ropes(self, positions: Tensor) -> list[Any]:
        return [self._ops.take_rope(table, positions) for table in self._ropes]

    def logits(self, hidden: Tensor, norm: Norm | None = None) -> Tensor:
        """hidden [R, hidden] of `hidden_states` → [R, vocab]. `norm`: of who has one of its own
        before the same head."""
        logits = self._ops.norm_linear(hidden, norm or self._norm, self._head)
        return self._ops.soft_cap(logits, self._soft_cap) if self._soft_cap else logits

    def normed(self, hidden: Tensor) -> Tensor:
        """What the head reads of `hidden_states`."""
        return self._ops.norm(hidden, self._norm)

    def _embed(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding.index_select(0, input_ids)
        return hidden if self._embedding_scale == 1 else hidden.mul_(self._embedding_scale)


def _groups_of(index: int, config: ModelConfig, load: ModelLoader) -> list[int]:
    """The cache groups of a layer: of what it attends to, then of its state."""
    own = config.layers[index]
    attended = index if own is None or own.source is None else own.source
    ids = (attended, config.num_layers + index)
    return [load.places[each][0] for each in ids if each in load.places]


def _of(each: Sequence[Any], groups: Sequence[int]) -> Any:
    """What of each group is a layer's."""
    if len(groups) == 1:
        return each[groups[0]]
    return tuple(each[group] for group in groups) if groups else None


def _of_kind(ropes: Sequence[Any], rope: int | None) -> Any:
    return None if rope is None else ropes[rope]


def build(config: ModelConfig, load: ModelLoader, names: Names) -> Decoder:
    """A decoder all of whose layers are alike, as `config.style` says."""
    layer = SandwichLayer if config.style.has_post_norms else PreNormLayer
    return Decoder(config, load, names, partial(layer, config, load, names))


def rounded(scale: float, dtype: torch.dtype) -> float:
    """As the numbers that it multiplies: what gemma does, and of others no difference is known."""
    return torch.tensor(scale).to(dtype).item()


def _ends(config: ModelConfig, load: ModelLoader, names: Names) -> tuple[Tensor, Any]:
    """The embedding and the head."""
    size, scale = (config.vocab_size, config.hidden_size), config.logits_scale
    if not config.tie_word_embeddings:
        parts = (Part(names["head"], config.vocab_size),)
        head = LinearSpec(config.hidden_size, parts, scale=scale, stays_plain=True)
        return load.embedding(names["embedding"], *size), load.linear(head)
    # Of two names for one tensor, files may have kept either.
    module = names["embedding"]
    if load.header(f"{module}.weight") is None and load.header(f"{names['head']}.weight"):
        module = names["head"]
    embedding = load.embedding(module, *size)
    return embedding, load.tied_head(names["head"], module, embedding, scale)
