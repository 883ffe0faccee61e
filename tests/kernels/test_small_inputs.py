"""A whole model whose activations are made small, as it is: of the demo, in FP8.

A number on the edge between two codes may get either, for sums of another order, and one code that
is another one moves all that comes behind it: of the demo's logits after 20 tokens some 2 %, nearly
as far as small weights and activations move them. So a reference is computed with the codes that
the kernels made, and these are compared with its own, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from baton.kernels import small_linear
from baton.kernels.quantised_rows import quantise_rows
from baton.kernels.reference_scaled import InputScheme, QuantisedRows, quantise_rows_reference
from baton.shared.engine import device_choices, reference_operations, triton_operations
from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.reference_operations import ReferenceOperations
from baton.shared.engine.triton_operations import TritonOperations
from tests.device import ROOT

PROMPT = [11, 480, 7, 1900, 23, 3001, 77, 5, 640, 1212, 90, 33]
STEPS = [Batch([BatchRow(PROMPT, 0, [[1]])]), Batch([BatchRow([404], len(PROMPT), [[1]])])]
LIMITS = {
    torch.float32: (2e-4, 1e-5),
    torch.float16: (0.04, 1e-3),
    torch.bfloat16: (0.2, 1e-2),
}
"""By the dtype between layers: the share of codes that may be others, and how far logits may be
off. The reference is float32 all over."""
LIMITS_ON_GPU = {**LIMITS, torch.float32: (0.04, 3e-3), torch.float16: (0.06, 3e-3)}
"""Its tensor cores add up products of 8-bit floats to fewer digits than float32 has."""


@dataclass
class Codes:
    """What the kernels made, in the order in which layers take it; then what the reference makes,
    which goes on with the kernels'."""

    made: list[QuantisedRows] = field(default_factory=list)
    are_others: list[Tensor] = field(default_factory=list)
    """Which of the kernels' are not the reference's."""
    num_tokens: int = 0
    """Of a step; 0 while a runner starts. Rows behind them pad."""

    def make(self, x: Tensor, scheme: InputScheme, **options: Any) -> QuantisedRows:
        rows = quantise_rows(x, scheme, **options)
        if self.num_tokens:
            count = self.num_tokens
            self.made.append(QuantisedRows(rows.codes[:count].cpu(), rows.scale[:count].cpu()))
        return rows

    def take(self, x: Tensor, scheme: InputScheme) -> QuantisedRows:
        own = quantise_rows_reference(x, scheme)
        if not self.num_tokens:
            return own
        theirs, count = self.made.pop(0), self.num_tokens
        is_other = theirs.codes.float() != own.codes[:count].float()
        self.are_others.append(is_other.float().view(-1))
        own.codes[:count] = theirs.codes
        own.scale[:count] = theirs.scale
        return own

    def logits(self, runner: ModelRunner) -> Tensor:
        found = []
        for batch in STEPS:
            self.num_tokens = sum(row.num_tokens for row in batch.rows)
            found.append(runner.logits(batch).cpu())
        self.num_tokens = 0
        return torch.cat(found)


@pytest.mark.usefixtures("few_programs")
def test_the_demo_with_the_kernels_codes(
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    codes = Codes()
    ours = partial(TritonOperations, keeps_small=True, takes_float8=True, quantises_inputs=True)
    theirs = partial(ReferenceOperations, quantises_inputs=True)
    monkeypatch.setattr(triton_operations, "TritonOperations", lambda **_: ours())
    monkeypatch.setattr(device_choices, "ReferenceOperations", lambda **_: theirs())
    monkeypatch.setattr(triton_operations, "quantise_rows", codes.make)
    monkeypatch.setattr(reference_operations, "quantise_rows_reference", codes.take)
    # One row's product makes its codes by itself, where nobody sees them.
    monkeypatch.setattr(small_linear, "takes_norm", lambda *_: False)

    def runner(kernels: str, place: str, dtype: torch.dtype) -> ModelRunner:
        return ModelRunner(
            EngineConfig(
                ROOT / "models" / "demo",
                place,
                str(dtype).removeprefix("torch."),
                kernels=kernels,
                num_blocks=8,
                max_num_seqs=4,
                quantization="fp8",
            )
        )

    got = codes.logits(runner("triton", device.type, dtype))
    num_layers = len(codes.made)
    expected = codes.logits(runner("torch", "cpu", torch.float32))
    assert num_layers == 2 * 4 * 6 and not codes.made
    share = float(torch.cat(codes.are_others).mean())
    error = float((got - expected).norm() / expected.norm())
    record_property("share of other codes", share)
    record_property("error of logits", error)
    limits = LIMITS if device.type == "cpu" else LIMITS_ON_GPU
    assert share < limits[dtype][0] and error < limits[dtype][1]
