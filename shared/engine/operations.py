"""The operations a model is made of: one interface, two tables of kernels.

`ReferenceOperations` (reference_operations.py) is plain torch and serves every device; its bits are
the class `exact` on a CPU. `TritonOperations` (triton_operations.py) is kernels/*.py on a GPU. A
model is written once, over this interface.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from baton.kernels.reference import Activation, HeadNorms
from baton.kernels.reference_conv import Conv
from baton.kernels.reference_delta import DeltaGates
from baton.kernels.reference_experts import Routes
from baton.kernels.reference_gated_norm import GatedNorm
from baton.kernels.reference_latent import LatentHeads
from baton.kernels.reference_ssd import SsdWeights
from baton.kernels.routing import RoutingRule
from baton.shared.engine.experts import Experts, ExpertsSpec
from baton.shared.engine.linear import Linear, LinearSpec, PartReader, Ranks


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm."""

    weight: Tensor
    """[hidden], in the activations' dtype, or in float32: then it is applied before rounding."""
    eps: float
    """Added to the mean of squares."""


class GatedLinears(NamedTuple):
    """The products of a gated MLP."""

    gate_up: Linear
    down: Linear


class Operations(Protocol):
    """Shapes and meaning of what is not described here are given in kernels/reference.py.

    A `rope` and a `plan` are made once per step for all layers, by whoever prepares the step; what
    they are is between the table and its steps (host_executor.py, device_executor.py).
    """

    @property
    def ranks(self) -> Ranks:
        """Which share of split layers is loaded here."""

    @property
    def keeps_small(self) -> bool:
        """Quantised weights are computed as they are stored, where there is a product for that."""

    @property
    def quantises_inputs(self) -> bool:
        """Activations are made small in front of layers whose checkpoint says so."""

    @property
    def keeps_experts(self) -> bool:
        """So are experts: see `keep_experts_small`."""

    def load_linear(self, spec: LinearSpec, reader: PartReader) -> Linear:
        """A layer of a checkpoint's parts, this rank's share of it.

        Raises:
            ModelError: a tensor is missing, has another shape, or a form that is not served.
        """

    def keep_experts_small(self) -> None:
        """From now on experts are computed as they are stored, where there is a way."""

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Linear:
        """A layer of a weight [out, in] that is there already, as the table of a tied embedding.
        Its memory is used where the form allows it."""

    def pack_rope(
        self, cos: Tensor, sin: Tensor, dtype: torch.dtype, query_scale: Tensor | None = None
    ) -> Any: ...

    def take_rope(self, table: Any, positions: Tensor) -> Any:
        """The rope of a step's tokens, once for all layers; positions int [T]."""

    def load_experts(self, spec: ExpertsSpec, reader: PartReader) -> Experts:
        """The experts of a layer, this rank's share of each.

        Raises:
            ModelError: as of `load_linear`.
        """

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """norm(x), [T, hidden] each."""

    def linear(self, x: Tensor, layer: Linear, residual: Tensor | None = None) -> Tensor:
        """(x · weightᵀ + bias) · scale + residual: x [T, in], residual [T, out] → [T, out].

        The residual's memory may be taken for the result. Of a layer split by rows, the ranks'
        products are added up before bias and residual are."""

    def norm_linear(self, x: Tensor, norm: Norm, layer: Linear) -> Tensor:
        """`linear` of norm(x). Not for layers that are split by rows."""

    def norm_gate_up(
        self, x: Tensor, norm: Norm, layer: Linear, activation: Activation = "silu"
    ) -> Tensor:
        """activation(gate) · up, where (gate, up) = `norm_linear`: x [T, in] → [T, out / 2]. Not
        for layers that are split by rows."""

    def gated_mlp(
        self,
        x: Tensor,
        norm: Norm,
        mlp: GatedLinears,
        activation: Activation = "silu",
        residual: Tensor | None = None,
    ) -> Tensor:
        """`linear` down of `norm_gate_up`: x [T, in] → [T, out], plus the residual of that
        shape, whose memory may be taken for the result."""

    def activate_and_mul(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        """activation(gate) · up, of [T, size] each, whose rows may be strided → a new tensor."""

    def norm_scores(self, x: Tensor, norm: Norm, layer: Linear) -> tuple[Tensor, Tensor]:
        """norm(x), [T, in] each, and `linear` of it in float32 [T, out], as the layer is."""

    def route(
        self,
        logits: Tensor,
        rule: RoutingRule,
        choice_bias: Tensor | None = None,
        expert_scale: Tensor | None = None,
    ) -> Routes:
        """See kernels/reference_experts.py."""

    def joins_shared(self, num_tokens: int, layer: Experts, mlp: GatedLinears) -> bool:
        """Whether `experts` takes such an MLP, of the same activation, along in a step of so many
        tokens."""

    def experts(
        self,
        x: Tensor,
        routes: Routes,
        layer: Experts,
        residual: Tensor | None = None,
        shared: GatedLinears | None = None,
        shared_gate: Tensor | None = None,
    ) -> Tensor:
        """Each token's experts of x [T, hidden], weighted and added up, plus the residual of that
        shape, and what `shared` makes of x, where `joins_shared`, times the sigmoid of its gate,
        float32 [T, 1]. The residual's memory may be taken for the result."""

    def gated_add(self, x: Tensor, gate: Tensor, residual: Tensor | None) -> Tensor:
        """sigmoid(gate) · x + residual: x and residual [T, hidden], gate float32 [T, 1]. The
        residual's memory may be taken for it."""

    def norm_add(self, x: Tensor, norm: Norm, residual: Tensor) -> Tensor:
        """residual + norm(x), [T, hidden] each. The residual's memory may be taken for it."""

    def rope_and_store(
        self,
        qkv: Tensor,
        rope: Any,
        kv: Tensor,
        layer: int,
        plan: Any,
        num_heads: int,
        norms: HeadNorms | None = None,
    ) -> Tensor: ...

    def store_kv(self, key: Tensor, value: Tensor, kv: Tensor, layer: int, plan: Any) -> None: ...

    def rope_query(self, query: Tensor, rope: Any, norms: HeadNorms | None = None) -> Tensor: ...

    def paged_attention(
        self,
        query: Tensor,
        kv: Tensor,
        layer: int,
        plan: Any,
        scale: float,
        cap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor: ...

    def rope_and_store_latent(
        self,
        query: Tensor,
        latent: Tensor,
        norm: Norm,
        rope: Any,
        kv: Tensor,
        layer: int,
        plan: Any,
        heads: LatentHeads,
    ) -> Tensor:
        """See kernels/reference_latent.py, as of the next, which takes what this returns: queries,
        perhaps absorbed."""

    def latent_attention(
        self,
        query: Tensor,
        kv: Tensor,
        layer: int,
        plan: Any,
        heads: LatentHeads,
        scale: float,
    ) -> Tensor: ...

    def soft_cap(self, x: Tensor, cap: float) -> Tensor: ...

    # Of layers that keep a state: `state` is one of its tensors, `plan` what kernels/state_plan.py
    # says of the step's rows.

    def causal_conv(self, x: Tensor, conv: Conv, state: Tensor, layer: int, plan: Any) -> Tensor:
        """See kernels/reference_conv.py."""

    def gated_delta(
        self,
        qkv: Tensor,
        strength: Tensor,
        decay: Tensor,
        gates: DeltaGates,
        state: Tensor,
        layer: int,
        plan: Any,
    ) -> Tensor:
        """See kernels/reference_delta.py."""

    def ssd(
        self, x: Tensor, dt: Tensor, weights: SsdWeights, state: Tensor, layer: int, plan: Any
    ) -> Tensor:
        """See kernels/reference_ssd.py."""

    def gated_norm(self, x: Tensor, gate: Tensor, norm: GatedNorm) -> Tensor:
        """See kernels/reference_gated_norm.py."""
