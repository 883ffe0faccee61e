"""The operations a model is made of: one interface, two tables of kernels.

`reference` is plain torch and serves every device; its bits are the class `exact` on a CPU.
`triton` is kernels/*.py on a GPU. A model is written once, over this interface.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor

from baton.kernels import reference


class Operations(Protocol):
    """Shapes and meaning of each are given in kernels/reference.py.

    A `rope` and a `plan` are made once per step for all layers, by whoever prepares the step; what
    they are is between the table and its steps (host_steps.py, device_steps.py).
    """

    def pack_weight(self, weight: Tensor) -> Tensor: ...

    def pack_rope(self, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Any: ...

    def take_rope(self, table: Any, positions: Tensor) -> Any: ...

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
    ) -> Tensor:
        """The residual's memory may be taken for the result."""

    def norm_linear(
        self, x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
    ) -> Tensor: ...

    def norm_gate_up(
        self, x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
    ) -> Tensor: ...

    def rope_and_store(
        self, qkv: Tensor, rope: Any, kv: Tensor, layer: int, plan: Any, num_heads: int
    ) -> Tensor: ...

    def paged_attention(
        self, query: Tensor, kv: Tensor, layer: int, plan: Any, scale: float
    ) -> Tensor: ...


def reference_operations() -> Operations:
    """The torch reference."""
    return cast(Operations, reference)
