"""Weights of gemmas: tensors that layers with another's cache do not need, what is said of those
that are missing or of another shape, and weights that are wider than what they multiply."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.model_files.fields import ModelError
from tests.device import ENGINE
from tests.unit.engine.tiny_models import TINY_MODELS, make_tiny

Edit = Callable[[dict[str, Tensor]], object]
SHARED = "model.layers.4."
TABLE = "model.embed_tokens_per_layer.weight"


def logits(model_dir: Path, **config: str) -> Tensor:
    runner = ModelRunner(EngineConfig(model_dir, num_blocks=64, **{**ENGINE, **config}))
    tables = [list(range(4 * index, 4 * index + 4)) for index in range(len(runner.groups))]
    return runner.logits(Batch([BatchRow(list(range(40)), 0, tables)]))[0].clone()


@pytest.fixture
def edit(tmp_path: Path) -> Callable[[Edit], Path]:
    make_tiny(tmp_path, "gemma4_text", TINY_MODELS["gemma4_text"]["shared"])
    path = tmp_path / "model.safetensors"

    def apply(edit: Edit) -> Path:
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, {"format": "pt"})
        return tmp_path

    return apply


def test_keys_and_values_of_a_layer_that_reads_anothers_are_not_read(
    edit: Callable[[Edit], Path],
) -> None:
    expected = logits(edit(lambda tensors: None))

    def add(tensors: dict[str, Tensor]) -> None:
        for module in ("k_proj", "v_proj"):
            tensors[f"{SHARED}self_attn.{module}.weight"] = torch.ones(48, 64)
        tensors[f"{SHARED}self_attn.k_norm.weight"] = torch.ones(24)

    assert torch.equal(logits(edit(add)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{SHARED}layer_scalar"), f"{SHARED}layer_scalar: missing tensor"),
        (lambda t: t.pop(TABLE), f"{TABLE}: missing tensor"),
        (
            lambda t: t.update({TABLE: t[TABLE][:, :-8].contiguous()}),
            rf"{TABLE}: shape \[320, 32\] where config.json makes it \[320, 40\]",
        ),
        (
            lambda t: t.update({f"{SHARED}mlp.up_proj.weight": torch.zeros(112, 64)}),
            rf"{SHARED}mlp.up_proj.weight: shape .* where config.json makes it \[224, 64\]",
        ),
        (
            lambda t: t.update({f"{SHARED}router.proj.weight": torch.zeros(4, 64)}),
            f"{SHARED}router.proj.weight: unexpected tensor",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    edit: Callable[[Edit], Path], change: Edit, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        logits(edit(change))


@pytest.mark.parametrize(
    ("model_type", "case"),
    [
        ("gemma2", "as they come"),
        ("gemma3_text", "two ropes"),
        ("gemma4_text", "odd heads, biases"),
    ],
)
def test_bfloat16_is_near(model_type: str, case: str, tmp_path: Path) -> None:
    """To transformers in float32 with the same weights, bfloat16 numbers."""
    model = make_tiny(tmp_path, model_type, TINY_MODELS[model_type][case], std=0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        expected = model(torch.arange(40)[None]).logits[0, -1]
    got = logits(tmp_path, dtype="bfloat16")
    torch.testing.assert_close(got, expected, atol=2e-2 * float(expected.abs().max()), rtol=0)
