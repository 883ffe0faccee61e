"""The operations a model is made of: the seam between the torch reference and faster kernels."""

from __future__ import annotations

from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import kernels.reference


class Operations(Protocol):
    """Shapes and meaning of each are given in kernels/reference.py.

    `plan_step` prepares a step for all layers of a cache group; what it returns is for the same
    table's `store_kv` and `paged_attention` only.
    """

    def pack_weight(self, weight: Tensor) -> Tensor: ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...

    def silu_and_mul(self, x: Tensor) -> Tensor: ...

    def plan_step(
        self,
        query_start: npt.NDArray[np.int64],
        context_lens: npt.NDArray[np.int64],
        block_table: npt.NDArray[np.int64],
        slot_mapping: npt.NDArray[np.int64],
        kv: Tensor,
        *,
        num_heads: int,
        min_rows: int,
    ) -> Any: ...

    def store_kv(self, key: Tensor, value: Tensor, kv: Tensor, layer: int, plan: Any) -> None: ...

    def paged_attention(
        self, query: Tensor, kv: Tensor, layer: int, plan: Any, scale: float
    ) -> Tensor: ...

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        key: Tensor,
    ) -> Tensor: ...


def operations_for(device: torch.device) -> Operations:
    """The table for a device; today the torch reference serves them all."""
    return cast(Operations, kernels.reference)
