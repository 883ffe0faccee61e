"""A mixture of experts in the place of a gated MLP: a router, experts, and perhaps one that every
token has.
"""

from __future__ import annotations

from torch import Tensor

from baton.kernels.reference_experts import Routes
from baton.shared.engine.experts import ExpertNames, ExpertsSpec
from baton.shared.engine.linear import LinearSpec
from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.models.blocks import GatedMlp, Names, Piece, parts
from baton.shared.engine.models.mixture_config import MixtureConfig
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.operations import Norm


def load_mlp(
    config: ModelConfig, load: ModelLoader, names: Names, prefix: str, index: int
) -> GatedMlp | Mixture:
    """What layer `index` has behind its attention."""
    mixture = config.mixture
    if mixture is None or not mixture.layers[index]:
        return GatedMlp(config, load, names, prefix)
    return Mixture(config, mixture, load, names, prefix)


class Router:
    """Which experts a token has, and how much of each. Its products are float32, whatever the
    activations are: what rounding tips there is another expert."""

    def __init__(
        self,
        config: ModelConfig,
        mixture: MixtureConfig,
        load: ModelLoader,
        names: Names,
        prefix: str,
    ) -> None:
        """`names`: router; choice_bias, shared_gate and expert_scale where there are such."""
        self._ops = load.ops
        self._rule = rule = mixture.routing
        pieces = [Piece("router", rule.num_experts, mixture.has_bias)]
        if mixture.has_shared_gate:
            pieces.append(Piece("shared_gate", 1))
        outputs = parts(names, prefix, *pieces)
        self._linear = load.linear(LinearSpec(config.hidden_size, outputs, is_wide=True))

        def by_expert(name: str) -> Tensor:
            return load.numbers(prefix + names[name], rule.num_experts, is_wide=True)

        self._choice_bias = by_expert("choice_bias") if mixture.has_choice_bias else None
        self._expert_scale = by_expert("expert_scale") if "expert_scale" in names else None

    def __call__(self, hidden: Tensor, norm: Norm) -> tuple[Tensor, Routes, Tensor]:
        """→ norm(hidden), [T, hidden] each; its routes; the gate of the shared expert, float32
        [T, 1] if there is one."""
        x, outputs = self._ops.norm_scores(hidden, norm, self._linear)
        num_experts = self._rule.num_experts
        routes = self._ops.route(
            outputs[:, :num_experts], self._rule, self._choice_bias, self._expert_scale
        )
        return x, routes, outputs[:, num_experts:]


class Mixture:
    """Σ weight · expert(norm(h)), and perhaps an expert that every token has.

    Names: as of `Router`; those of `load_experts`; shared_mlp_gate, _up and _down.
    """

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
        self._experts = load.experts(experts_spec(config, mixture, names, prefix))
        self._has_shared_gate = mixture.has_shared_gate
        self._may_join = mixture.activation == config.style.activation
        self._shared = None
        if mixture.shared_size:
            own = {name: names[f"shared_mlp_{name}"] for name in ("gate", "up", "down")}
            self._shared = GatedMlp(
                config, load, own, prefix, intermediate_size=mixture.shared_size
            )

    def __call__(self, hidden: Tensor, norm: Norm, residual: Tensor | None = None) -> Tensor:
        x, routes, gate = self._router(hidden, norm)
        if self._shared is not None:
            mlp = self._shared.linears
            if self._may_join and self._ops.joins_shared(len(x), self._experts, mlp):
                own = gate if self._has_shared_gate else None
                return self._ops.experts(x, routes, self._experts, residual, mlp, own)
            if self._has_shared_gate:
                residual = self._ops.gated_add(self._shared(hidden, norm), gate, residual)
            else:
                residual = self._shared(hidden, norm, residual)
        return self._ops.experts(x, routes, self._experts, residual)


def experts_spec(
    config: ModelConfig, mixture: MixtureConfig, names: Names, prefix: str
) -> ExpertsSpec:
    """`names`: fused_gate_up, fused_down, and expert_gate, _up and _down where checkpoints have
    experts one by one."""
    one_by_one = {
        name: prefix + names[f"expert_{name}"]
        for name in ("gate", "up", "down")
        if f"expert_{name}" in names
    }
    return ExpertsSpec(
        names=ExpertNames(
            fused_gate_up=prefix + names["fused_gate_up"],
            fused_down=prefix + names["fused_down"],
            **one_by_one,
        ),
        num_experts=mixture.routing.num_experts,
        num_in=mixture.input_size or config.hidden_size,
        size=mixture.expert_size,
        activation=mixture.activation,
        has_bias=mixture.has_bias,
        alternates=mixture.alternates,
        may_be_mxfp4=mixture.may_be_mxfp4,
    )
