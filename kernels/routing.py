"""How a mixture of experts chooses, and what its experts do between their two products: what the
references and the kernels of both agree on. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Scoring = Literal["softmax", "softmax_of_chosen", "sigmoid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRule:
    """Which experts a token gets, and how much of each."""

    num_experts: int
    top_k: int
    """Experts of a token. Of equal scores the one of the lower number counts as higher."""
    scoring: Scoring = "softmax"
    """What a score is: softmax of all logits, sigmoid of each; or the logit itself, and weights are
    the softmax of those chosen."""
    is_normalised: bool = False
    """Weights are divided by their sum; not for softmax_of_chosen, whose sum is 1."""
    floor: float = 0.0
    """Added to that sum."""
    scale: float = 1.0
    """Of the weights, at last."""
    num_groups: int = 1
    """Experts are chosen from `top_groups` of so many groups of neighbours: those whose
    `group_best` highest scores have the highest sums."""
    top_groups: int = 1
    group_best: Literal[1, 2] = 2


class ClampedSwiglu(NamedTuple):
    """min(gate, limit) · sigmoid(slope · min(gate, limit)) · (up within ± limit, + 1)."""

    slope: float
    limit: float
