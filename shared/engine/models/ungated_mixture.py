"""A mixture of MLPs without gates, beside one that every token has; perhaps over latents."""

from __future__ import annotations

from torch import Tensor

from baton.shared.engine.linear import LinearSpec
from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.models.blocks import Names, Piece, parts
from baton.shared.engine.models.mamba import UngatedMlp
from baton.shared.engine.models.mixture import Router, experts_spec
from baton.shared.engine.models.nemotron_h import NemotronHConfig
from baton.shared.engine.operations import Norm


class UngatedMixture:
    """Σ weight · expert(norm(h)) + mlp(norm(h)); over latents these are what experts take and give.

    Names: as of `Router`; those of `experts_spec`; shared_up and shared_down; with latents
    to_latent and of_latent.
    """

    def __init__(
        self, config: NemotronHConfig, load: ModelLoader, names: Names, prefix: str
    ) -> None:
        mixture = config.mixture
        assert mixture is not None
        self._ops = load.ops
        self._router = Router(config, mixture, load, names, prefix)
        self._to_latent = self._of_latent = None
        hidden, latent = config.hidden_size, config.latent_size
        if latent is not None:
            has_bias = config.style.mlp_bias
            piece = parts(names, prefix, Piece("to_latent", latent, has_bias))
            self._to_latent = load.linear(LinearSpec(hidden, piece))
            piece = parts(names, prefix, Piece("of_latent", hidden, has_bias))
            self._of_latent = load.linear(LinearSpec(latent, piece))
        self._experts = load.experts(experts_spec(config, mixture, names, prefix))
        own = {"up": names["shared_up"], "down": names["shared_down"]}
        self._shared = UngatedMlp(config, load, own, prefix, config.shared_size)

    def __call__(self, hidden: Tensor, norm: Norm, residual: Tensor | None = None) -> Tensor:
        x, routes, _ = self._router(hidden, norm)
        shared = self._shared(hidden, norm, residual)
        if self._to_latent is None or self._of_latent is None:
            return self._ops.experts(x, routes, self._experts, shared)
        latent = self._ops.experts(self._ops.linear(x, self._to_latent), routes, self._experts)
        return self._ops.linear(latent, self._of_latent, shared)
