"""The layer of falcon_h1.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.models.blocks import Attention, GatedMlp, Names, load_norm
from baton.shared.engine.models.falcon_h1 import FalconH1Config
from baton.shared.engine.models.mamba import MambaMixer, scaled_norm


class FalconH1Layer:
    """h + attention(norm(h)) + mixer(norm(h)), then h + mlp(norm(h)).

    Names: input_norm, mlp_norm, and those of `Attention`, `MambaMixer` and `GatedMlp`.
    """

    def __init__(self, config: FalconH1Config, load: ModelLoader, names: Names, index: int) -> None:
        prefix = names["layer"].format(index)
        self._norm = load_norm(config, load, prefix + names["input_norm"])
        self._attention_norm = scaled_norm(self._norm, config.attention_in)
        style = replace(config.style, residual_scale=config.attention_out)
        self._attention = Attention(replace(config, style=style), load, names, prefix, index)
        self._mixer = MambaMixer(config, load, names, prefix, index)
        self._mlp_norm = load_norm(config, load, prefix + names["mlp_norm"])
        # Gate and up are both multiplied, and what is too much taken back behind them.
        style = replace(config.style, residual_scale=config.mlp_out / config.gate)
        self._mlp = GatedMlp(
            replace(config, style=style), load, names, prefix, input_scale=config.gate
        )
        own = config.layers[index]
        assert own is not None
        self._sizes = [own.num_heads * own.head_dim, config.mamba.inner_size]
        self._head_dim = own.head_dim

    def query(self, hidden: Tensor, rope: Any, kv: Any, plan: Any) -> Tensor:
        """→ [T, …]: queries and what the mixer gives, side by side."""
        query = self._attention.query(hidden, self._attention_norm, rope, kv[0], plan[0])
        mixed = self._mixer.query(hidden, self._norm, rope, kv[1], plan[1])
        return torch.cat((query.flatten(1), mixed), 1)

    def finish(
        self, hidden: Tensor, query: Tensor, kv: Any, plan: Any, extra: Tensor | None = None
    ) -> Tensor:
        assert extra is None
        heads, mixed = torch.split(query, self._sizes, 1)
        heads = heads.reshape(len(heads), -1, self._head_dim)
        hidden = self._attention.attend(heads, kv[0], plan[0], hidden)
        hidden = self._mixer.attend(mixed, kv[1], plan[1], hidden)
        return self._mlp(hidden, self._mlp_norm, hidden)
