"""Decoder layers of attention and gated MLP, or mixture of experts, with a norm before each, or
before and behind each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.models.blocks import Attention, GatedMlp, Names, load_norm
from baton.shared.engine.models.latent_attention import LatentAttention
from baton.shared.engine.models.mixture import load_mlp
from baton.shared.engine.models.model_config import ModelConfig


def load_attention(
    config: ModelConfig, load: ModelLoader, names: Names, prefix: str, index: int
) -> Attention | LatentAttention:
    """What layer `index` attends by."""
    own = config.layers[index]
    if own is None or own.latent is None:
        return Attention(config, load, names, prefix, index)
    return LatentAttention(config, own.latent, load, names, prefix, index)


class PreNormLayer:
    """h + attention(norm(h)), then h + mlp(norm(h)).

    Names: input_norm, mlp_norm, and those of `Attention` or `LatentAttention`, and of `GatedMlp` or
    `Mixture`.
    """

    def __init__(self, config: ModelConfig, load: ModelLoader, names: Names, index: int) -> None:
        prefix = names["layer"].format(index)
        self._input_norm = load_norm(config, load, prefix + names["input_norm"])
        self._attention = load_attention(config, load, names, prefix, index)
        self._mlp_norm = load_norm(config, load, prefix + names["mlp_norm"])
        self._mlp = load_mlp(config, load, names, prefix, index)

    def query(self, hidden: Tensor, rope: Any, kv: Tensor, plan: Any) -> Tensor:
        return self._attention.query(hidden, self._input_norm, rope, kv, plan)

    def finish(
        self, hidden: Tensor, query: Tensor, kv: Tensor, plan: Any, extra: Tensor | None = None
    ) -> Tensor:
        assert extra is None
        hidden = self._attention.attend(query, kv, plan, hidden)
        return self._mlp(hidden, self._mlp_norm, hidden)


class SandwichLayer:
    """h + norm(attention(norm(h))), then h + norm(mlp(norm(h))).

    Attributes of those that derive:
        _beside_mlp: what is made of h and of mlp(norm(h)) before the last norm; None: the latter.

    Names: as of `PreNormLayer`, and attention_post_norm, mlp_post_norm.
    """

    def __init__(
        self,
        config: ModelConfig,
        load: ModelLoader,
        names: Names,
        index: int,
        *,
        intermediate_size: int | None = None,
    ) -> None:
        """`intermediate_size`: if it is not the model's."""
        prefix = names["layer"].format(index)
        self._ops = load.ops
        self._input_norm = load_norm(config, load, prefix + names["input_norm"])
        self._attention = Attention(config, load, names, prefix, index)
        self._attention_post_norm = load_norm(config, load, prefix + names["attention_post_norm"])
        self._mlp_norm = load_norm(config, load, prefix + names["mlp_norm"])
        self._mlp = GatedMlp(config, load, names, prefix, intermediate_size=intermediate_size)
        self._beside_mlp: Callable[[Tensor, Tensor], Tensor] | None = None
        self._mlp_post_norm = load_norm(config, load, prefix + names["mlp_post_norm"])

    def query(self, hidden: Tensor, rope: Any, kv: Tensor, plan: Any) -> Tensor:
        return self._attention.query(hidden, self._input_norm, rope, kv, plan)

    def finish(
        self, hidden: Tensor, query: Tensor, kv: Tensor, plan: Any, extra: Tensor | None = None
    ) -> Tensor:
        assert extra is None
        attended = self._attention.attend(query, kv, plan)
        hidden = self._ops.norm_add(attended, self._attention_post_norm, hidden)
        added = self._mlp(hidden, self._mlp_norm)
        if self._beside_mlp is not None:
            added = self._beside_mlp(hidden, added)
        return self._ops.norm_add(added, self._mlp_post_norm, hidden)
