"""Plain weights that are made small while they are loaded (`--quantization`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.quantised.quantise import Method, quantise
from baton.shared.model_files.fields import ModelError
from tests.unit.engine.conftest import MakeLlama

LOST: dict[Method, float] = {"fp8": 0.03, "fp8-blocks": 0.03, "int8": 0.01, "int4": 0.11}
"""The norm of what is lost, over that of normally distributed weights."""


@pytest.mark.parametrize("method", LOST)
def test_the_nearest_codes(method: Method) -> None:
    weight = torch.randn(48, 384, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    made = quantise(weight, method)
    assert made is not None and made.num_bits == (4 if method == "int4" else 8)
    assert made.scale.shape == (48, 3 if method in ("int4", "fp8-blocks") else 1)
    numbers = made.expand(torch.float32)
    assert float((numbers - weight).norm() / weight.norm()) < LOST[method]
    assert not numbers[3].any()
    paper = quantise(weight.to("meta"), method)
    assert paper is not None
    assert (paper.shape, paper.scale.shape[1]) == (made.shape, made.scale.shape[1])
    assert paper.codes.dtype == made.codes.dtype
    # What is farthest from zero of what shares a scale is a code of its own.
    runs, made_runs = (each.view(48, made.scale.shape[1], -1) for each in (weight, numbers))
    if method == "fp8-blocks":
        runs, made_runs = (each.transpose(0, 1).flatten(1) for each in (runs, made_runs))
    at = runs.abs().argmax(-1, keepdim=True)
    kept = made_runs.gather(-1, at)
    torch.testing.assert_close(kept, runs.gather(-1, at), rtol=1e-6, atol=1e-6)


def test_rows_that_no_run_divides_stay_as_they_are() -> None:
    assert quantise(torch.randn(8, 48), "int4") is None
    assert quantise(torch.randn(8, 192), "fp8-blocks") is None


def test_a_model_whose_weights_are_made_small(make_llama: MakeLlama) -> None:
    """As `exact` as others, told apart from them; the head stays as it is."""
    model_dir, _ = make_llama(hidden_size=64, intermediate_size=96)
    row = Batch([BatchRow(list(range(20)), 0, [[0, 1]])])

    def start(**fields: Any) -> ModelRunner:
        return ModelRunner(EngineConfig(model_dir, device="cpu", num_blocks=8, **fields))

    plain = start()
    expected = plain.logits(row)
    for method, most in (("int8", 0.05), ("fp8", 0.2)):
        runner = start(quantization=method)
        got = runner.logits(row)
        assert 0 < float((got - expected).norm() / expected.norm()) < most
        assert runner.determinism == "exact" and runner.numerics == f"{plain.numerics} {method}"
        assert runner.model_identity.digest == plain.model_identity.digest
    small = start(quantization="int4", dtype="bfloat16")
    assert small.numerics.endswith("small weights int4") and small.determinism == "consistent"
    exact = start(quantization="int4").logits(row)
    assert float((small.logits(row) - exact).norm() / exact.norm()) < 0.05


def test_what_is_quantised_already_is_refused(
    make_llama: MakeLlama, edit_config: Callable[..., None]
) -> None:
    model_dir, _ = make_llama()
    weights = {"num_bits": 8, "type": "int"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    method = {"quant_method": "compressed-tensors", "config_groups": groups}
    edit_config(model_dir, quantization_config=method)
    with pytest.raises(ModelError, match="quantised already: .*config.json says compressed-tensor"):
        ModelRunner(EngineConfig(model_dir, device="cpu", quantization="int8"))
    with pytest.raises(
        ModelError, match="quantization: must be one of fp8, fp8-blocks, int8, int4, not 'int3'"
    ):
        EngineConfig(model_dir, quantization="int3")  # type: ignore[arg-type]
