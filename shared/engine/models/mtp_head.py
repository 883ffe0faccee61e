"""A checkpoint's layer that guesses tokens ahead, between the model's embedding and its head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from baton.shared.engine.executor import Taps, Wanted
from baton.shared.engine.linear import LinearSpec, Part
from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.models.blocks import Names, load_norm
from baton.shared.engine.models.decoder import Decoder
from baton.shared.engine.models.delta_layers import GatedAttentionLayer
from baton.shared.engine.models.layers import PreNormLayer
from baton.shared.engine.models.mtp import MtpConfig


class MtpHead:
    """layer(projection([norm(embedding); norm(what came of the token before)])).

    Names: those of `PreNormLayer`, or `GatedAttentionLayer` where attention has a gate; and not
    within the layer embedding_norm, hidden_norm, projection, own_norm. Embedding and head are those
    of the model whose tokens it guesses: nothing is computed before `complete`.
    """

    def __init__(self, config: MtpConfig, load: ModelLoader, names: Names) -> None:
        self._ops, size = load.ops, config.hidden_size
        self.hidden_size = size
        self.embedding: Tensor | None = None
        self._embedding_norm = load_norm(config, load, names["embedding_norm"])
        self._hidden_norm = load_norm(config, load, names["hidden_norm"])
        projection = Part(names["projection"], size)
        self._projection = load.linear(LinearSpec(2 * size, (projection,)))
        kind = GatedAttentionLayer if config.style.has_output_gate else PreNormLayer
        self._layer = kind(config, load, names, 0)
        self._norm = load_norm(config, load, names["own_norm"])
        [attention] = config.attentions
        self._rope = load.rope(attention.rope, attention.head_dim)

    def complete(self, model: Decoder) -> None:
        """Takes the model's last norm and head; its embedding was set."""
        self._model = model

    def fuse(self, taps: Tensor) -> Tensor:
        """The model's last hidden states [T, hidden] → what comes with the next token."""
        return self._model.normed(taps)

    def hidden_states(
        self,
        input_ids: Tensor,
        positions: Tensor,
        caches: Sequence[Any],
        plans: Sequence[Any],
        wanted: Wanted | None = None,
        *,
        features: Tensor | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        """As `Decoder.hidden_states`, all tokens. `features` [T, hidden]: what came of the token
        before each; `taps`: gets what comes with the next."""
        assert wanted is None and features is not None and taps is not None
        assert self.embedding is not None
        ops, [kv], [plan] = self._ops, caches, plans
        embedded = ops.norm(self.embedding.index_select(0, input_ids), self._embedding_norm)
        before = ops.norm(features, self._hidden_norm)
        hidden = ops.linear(torch.cat((embedded, before), -1), self._projection)
        query = self._layer.query(hidden, ops.take_rope(self._rope, positions), kv, plan)
        hidden = self._layer.finish(hidden, query, kv, plan)
        taps.take(1, ops.norm(hidden, self._norm))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] → [R, vocab], by the model's head."""
        return self._model.logits(hidden, self._norm)
