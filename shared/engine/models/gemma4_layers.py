"""What gemma4's decoder is made of beside what all are: inputs of each token for every layer, and
mixtures of experts beside the MLPs. gemma4.py reads the config."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from baton.shared.engine.linear import LinearSpec
from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.models.blocks import Names, Piece, load_norm, parts
from baton.shared.engine.models.decoder import Decoder, rounded
from baton.shared.engine.models.gemma4 import Gemma4Config
from baton.shared.engine.models.layers import SandwichLayer
from baton.shared.engine.models.mixture import Router, experts_spec
from baton.shared.engine.models.mixture_config import MixtureConfig
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.operations import Norm


class ExtraInputs:
    """What each layer gets of a token beside its input, made of the token's id and embedding."""

    def __init__(self, config: Gemma4Config, load: ModelLoader, names: Names) -> None:
        self._ops = load.ops
        self._size = config.extra_size
        size = config.num_layers * self._size
        self._table = load.embedding(names["extra_embedding"], config.extra_vocab_size, size)
        self._scale = rounded(self._size**0.5, load.dtype)
        projection = parts(names, "", Piece("extra_projection", size))
        self._projection = load.linear(
            LinearSpec(config.hidden_size, projection, scale=config.hidden_size**-0.5)
        )
        self._norm = load_norm(config, load, names["extra_projection_norm"], self._size)

    def __call__(self, input_ids: Tensor, embedded: Tensor) -> Tensor:
        """input_ids [T], embedded [T, hidden] → [T, num_layers, extra_size]."""
        of_id = self._table.index_select(0, input_ids).mul_(self._scale)
        projected = self._ops.linear(embedded, self._projection)
        by_layer = self._ops.norm_add(
            projected.view(-1, self._size), self._norm, of_id.view(-1, self._size)
        )
        return by_layer.mul_(2**-0.5).view(len(input_ids), -1, self._size)


class MixtureBeside:
    """norm(mlp(h)) + norm(experts(norm(h))), where the router has a norm of its own."""

    def __init__(
        self,
        config: ModelConfig,
        mixture: MixtureConfig,
        load: ModelLoader,
        names: Names,
        prefix: str,
    ) -> None:
        self._ops = load.ops
        self._router = Router(config, mixture, load, names, prefix)
        scale = load.numbers(prefix + names["router_norm"], config.hidden_size, is_wide=True)
        # What is on paper is not multiplied.
        scale = scale if scale.is_meta else scale * config.hidden_size**-0.5
        self._router_norm = Norm(scale, config.rms_norm_eps)
        self._experts = load.experts(experts_spec(config, mixture, names, prefix))
        self._norm = load_norm(config, load, prefix + names["mixture_norm"])
        self._post_norm = load_norm(config, load, prefix + names["mixture_post_norm"])
        self._beside_norm = load_norm(config, load, prefix + names["beside_mixture_norm"])

    def __call__(self, hidden: Tensor, of_mlp: Tensor) -> Tensor:
        """Of hidden and what the MLP makes of it, [T, hidden] each → the same shape."""
        _, routes, _ = self._router(hidden, self._router_norm)
        of_experts = self._ops.experts(self._ops.norm(hidden, self._norm), routes, self._experts)
        of_mlp = self._ops.norm(of_mlp, self._beside_norm)
        return self._ops.norm_add(of_experts, self._post_norm, of_mlp)


class Gemma4Layer(SandwichLayer):
    """A `SandwichLayer`, with a mixture beside the MLP if there is one, then h + norm(gated extra
    input, projected), and all times a number.

    Names: as of `SandwichLayer`, layer_scalar, and with extra inputs extra_gate, extra_output and
    extra_norm.
    """

    def __init__(self, config: Gemma4Config, load: ModelLoader, names: Names, index: int) -> None:
        if config.keys_are_values[index]:
            names = {name: module for name, module in names.items() if name != "v"}
        size = config.intermediate_sizes[index]
        super().__init__(config, load, names, index, intermediate_size=size)
        prefix = names["layer"].format(index)
        if config.mixture is not None:
            self._beside_mlp = MixtureBeside(config, config.mixture, load, names, prefix)
        self._activation = config.style.activation
        if config.extra_size:
            gate = parts(names, prefix, Piece("extra_gate", config.extra_size))
            self._extra_gate = load.linear(LinearSpec(config.hidden_size, gate))
            output = parts(names, prefix, Piece("extra_output", config.hidden_size))
            self._extra_output = load.linear(LinearSpec(config.extra_size, output))
            self._extra_norm = load_norm(config, load, prefix + names["extra_norm"])
        self._scalar = load.numbers(prefix + names["layer_scalar"], 1)

    def finish(
        self, hidden: Tensor, query: Tensor, kv: Tensor, plan: Any, extra: Tensor | None = None
    ) -> Tensor:
        hidden = super().finish(hidden, query, kv, plan)
        if extra is not None:
            gate = self._ops.linear(hidden, self._extra_gate)
            gated = self._ops.activate_and_mul(gate, extra, self._activation)
            added = self._ops.linear(gated, self._extra_output)
            hidden = self._ops.norm_add(added, self._extra_norm, hidden)
        return hidden.mul_(self._scalar)


def build(config: Gemma4Config, load: ModelLoader, names: Names) -> Decoder:
    extra_inputs = ExtraInputs(config, load, names) if config.extra_size else None
    make_layer = partial(Gemma4Layer, config, load, names)
    return Decoder(config, load, names, make_layer, extra_inputs)
