"""Mixtures of experts as config.json says them. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from baton.kernels.routing import RoutingRule
from baton.shared.model_files.fields import Fields

if TYPE_CHECKING:
    from baton.kernels.reference_experts import ExpertActivation


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureConfig:
    """The mixtures of a model, which are alike."""

    routing: RoutingRule
    expert_size: int
    """Of what is between an expert's products."""
    layers: tuple[bool, ...]
    """Which have one; the others have an MLP."""
    activation: ExpertActivation = "silu"
    input_size: int | None = None
    """Of what experts take and give; None: of hidden states."""
    has_bias: bool = False
    """The router and both products of experts."""
    has_choice_bias: bool = False
    """What is added to scores where experts are chosen, but not to their weights."""
    shared_size: int = 0
    """Of an expert that every token has; 0: none."""
    has_shared_gate: bool = False
    """What that expert gives is multiplied by a sigmoid of the token."""
    alternates: bool = False
    """Where all experts are in one tensor, it is [experts, in, out], and gate and up alternate."""
    may_be_mxfp4: bool = False
    """Experts may be stored so."""


def read_num_experts(fields: Fields, *names: str) -> int:
    """Of several spellings, which must say the same."""
    given = {name: fields.integer(name) for name in names if fields.has(name)}
    if len(set(given.values())) > 1:
        first, second, *_ = given
        raise fields.error(second, f"{given[second]} contradicts {first} {given[first]}")
    return next(iter(given.values()), None) or fields.integer(names[0])


def read_top_k(fields: Fields, num_experts: int, name: str = "num_experts_per_tok") -> int:
    top_k = fields.integer(name)
    if top_k > num_experts:
        raise fields.error(name, f"{top_k} of {num_experts} experts")
    return top_k


def read_groups(
    fields: Fields, num_experts: int, top_k: int, *, group_best: int = 2
) -> tuple[int, int]:
    """`n_group` and `topk_group`. `group_best`: as of `RoutingRule`."""
    num_groups, top_groups = fields.integer("n_group"), fields.integer("topk_group")
    if num_experts % num_groups:
        raise fields.error("n_group", f"{num_experts} experts are not {num_groups} equal groups")
    size = num_experts // num_groups
    if size < group_best:
        raise fields.error(
            "n_group", f"groups of {size}; they are chosen by their best two experts"
        )
    if top_groups > num_groups:
        raise fields.error("topk_group", f"{top_groups} of {num_groups} groups")
    if top_k > top_groups * size:
        raise fields.error(
            "topk_group", f"{top_groups} groups of {size} have no {top_k} experts to choose"
        )
    return num_groups, top_groups


def read_sigmoid_mixture(fields: Fields, layers: tuple[bool, ...]) -> MixtureConfig:
    """Experts chosen from groups by sigmoids and a bias, beside one that every token has."""
    num_experts = read_num_experts(fields, "n_routed_experts", "num_local_experts", "num_experts")
    top_k = read_top_k(fields, num_experts)
    num_groups, top_groups = read_groups(fields, num_experts, top_k)
    size = fields.integer("moe_intermediate_size")
    return MixtureConfig(
        routing=RoutingRule(
            num_experts=num_experts,
            top_k=top_k,
            scoring="sigmoid",
            is_normalised=fields.boolean("norm_topk_prob"),
            floor=1e-20,
            scale=fields.number("routed_scaling_factor"),
            num_groups=num_groups,
            top_groups=top_groups,
        ),
        expert_size=size,
        layers=layers,
        has_choice_bias=True,
        shared_size=size * fields.integer("n_shared_experts"),
    )


def read_first_dense(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    """All layers but the first `first_k_dense_replace` have a mixture."""
    first = fields.integer("first_k_dense_replace", least=0)
    return tuple(index >= first for index in range(num_layers))


def read_sparse_layers(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`-th layer has a mixture, but not those of `mlp_only_layers`."""
    step = fields.integer("decoder_sparse_step")
    dense = fields.integers("mlp_only_layers") or []
    if any(index < 0 for index in dense):
        raise fields.error("mlp_only_layers", f"{min(dense)} is no number of a layer")
    return tuple(index not in dense and (index + 1) % step == 0 for index in range(num_layers))
