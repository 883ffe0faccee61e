"""The layer of an EAGLE-3 head, what it takes, and its logits over the model's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from baton.shared.engine.executor import Taps, Wanted
from baton.shared.engine.linear import LinearSpec, Part
from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.models.blocks import Attention, GatedMlp, Names, load_norm
from baton.shared.engine.models.eagle3 import Eagle3Config
from baton.shared.engine.operations import Norm


class Eagle3Head:
    """
    Attributes:
        hidden_size: of what comes with a token.
        embedding: [vocab, hidden]; None: the files have none, and it is to be the model's.
    """

    def __init__(self, config: Eagle3Config, load: ModelLoader, names: Names) -> None:
        self._ops, self._config = load.ops, config
        size, num_joined = config.hidden_size, config.num_taps * config.target_hidden_size
        prefix = names["layer"]
        self.hidden_size = size
        self.embedding: Tensor | None = None
        if load.header(f"{names['embedding']}.weight") is not None:
            self.embedding = load.embedding(names["embedding"], config.vocab_size, size)
        self._fc_norms: list[Norm] = []
        if config.norm_before_fc:
            self._fc_norms = [load_norm(config, load, "input_norm", num_joined)]
        elif config.norms_each:
            self._fc_norms = [
                load_norm(config, load, f"fc_norm.{place}", config.target_hidden_size)
                for place in range(config.num_taps)
            ]
        self._fc = load.linear(LinearSpec(num_joined, (Part(names["fc"], size),)))
        self._input_norm = load_norm(config, load, prefix + names["input_norm"])
        self._hidden_norm = load_norm(config, load, prefix + names["hidden_norm"])
        self._attention = Attention(config, load, names, prefix, 0, num_in=2 * size)
        self._mlp_norm = load_norm(config, load, prefix + names["mlp_norm"])
        self._mlp = GatedMlp(config, load, names, prefix)
        self._norm = load_norm(config, load, names["norm"])
        head = Part(names["head"], config.draft_vocab_size)
        self._head = load.linear(LinearSpec(size, (head,), stays_plain=True))
        self._token_ids = self._read_token_ids(load)
        """int64 [draft vocab]; None: its vocabulary is the model's."""
        self._rope = load.rope(config.attentions[0].rope, config.head_dim)

    def _read_token_ids(self, load: ModelLoader) -> Tensor | None:
        """Files hold how much further each token is in the model's vocabulary."""
        config, num_own = self._config, self._config.draft_vocab_size
        if num_own == config.vocab_size:
            return None
        further = load.read("d2t", (num_own,))
        if further.is_meta:
            return None
        own = torch.arange(num_own, device=further.device)
        if further.is_floating_point():
            # Made up, as all weights are.
            return own
        token_ids = own + further
        lowest, highest = int(token_ids.min()), int(token_ids.max())
        if lowest < 0 or highest >= config.vocab_size or len(set(token_ids.tolist())) < num_own:
            raise load.error(
                "d2t",
                f"{num_own} tokens become ids from {lowest} to {highest}; they must be different "
                f"ones from 0 to {config.vocab_size - 1}",
            )
        return token_ids

    def fuse(self, taps: Tensor) -> Tensor:
        """The model's hidden states [T, taps · hidden] → what comes with the next token, [T,
        hidden]."""
        if len(self._fc_norms) == 1:
            taps = self._ops.norm(taps, self._fc_norms[0])
        elif self._fc_norms:
            parts = taps.chunk(len(self._fc_norms), -1)
            normed = zip(parts, self._fc_norms, strict=True)
            taps = torch.cat([self._ops.norm(part.contiguous(), norm) for part, norm in normed], -1)
        return self._ops.linear(taps, self._fc)

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
        """As `Decoder.hidden_states`, all tokens. `features` [T, hidden]: what came before each;
        `taps`: gets what comes with the next."""
        assert wanted is None and features is not None and taps is not None
        assert self.embedding is not None
        ops, [kv], [plan] = self._ops, caches, plans
        embedded = ops.norm(self.embedding.index_select(0, input_ids), self._input_norm)
        normed = ops.norm(features, self._hidden_norm)
        both = torch.cat((embedded, normed), -1)
        rope = ops.take_rope(self._rope, positions)
        query = self._attention.query(both, None, rope, kv, plan)
        # Its memory becomes another's.
        residual = normed if self._config.norm_before_residual else features.clone()
        hidden = self._attention.attend(query, kv, plan, residual)
        hidden = self._mlp(hidden, self._mlp_norm, hidden)
        taps.take(1, ops.norm(hidden, self._norm) if self._config.norm_output else hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] → [R, the model's vocab]; tokens that it has none for get −inf."""
        own = self._ops.norm_linear(hidden, self._norm, self._head)
        if self._token_ids is None:
            return own
        logits = own.new_full((len(own), self._config.vocab_size), -torch.inf)
        return logits.index_copy_(1, self._token_ids, own)
