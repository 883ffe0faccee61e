"""Checkpoints of multimodal types: where they keep the language model, and what else they hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.model_files.fields import ModelError
from tests.unit.engine.conftest import MakeRunner
from tests.unit.engine.tiny_models import TINY_MODELS, make_tiny

_VISION = "(vision_tower|multi_modal_projector|visual)"
FORMS: dict[str, list[tuple[str, str]]] = {
    "language model within": [
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^model\.(?!language_model|vis|multi)", "model.language_model."),
        (f"^{_VISION}", r"model.\1"),
    ],
    "language model beside": [
        ("^lm_head", "language_model.lm_head"),
        (r"^model\.language_model\.", "language_model.model."),
        (rf"^model\.{_VISION}", r"\1"),
    ],
    "like a language model": [
        (r"^language_model\.", ""),
    ],
}
"""Each made of the one before it, and the first of what transformers writes: the others."""
KINDS = [("mistral3", "untied"), ("qwen2_5_vl", "full"), ("qwen3_vl", "tied")]
EMBEDDING = "model.language_model.embed_tokens.weight"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def rewrite(model_dir: Path, change: Change) -> None:
    path = model_dir / "model.safetensors"
    save_file(change(load_file(path)), path)


def renamed(tensors: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    names = {name: name for name in tensors}
    for pattern, replacement in rules:
        names = {name: re.sub(pattern, replacement, new) for name, new in names.items()}
    return {names[name]: tensor for name, tensor in tensors.items()}


def logits(runner: ModelRunner) -> Tensor:
    return runner.logits(Batch([BatchRow(list(range(20)), 0, [[0, 1]])]))


@pytest.mark.parametrize(("model_type", "case"), KINDS)
def test_names_of_every_published_form(
    model_type: str, case: str, tmp_path: Path, make_runner: MakeRunner
) -> None:
    make_tiny(tmp_path, model_type, TINY_MODELS[model_type][case])
    expected = logits(make_runner(tmp_path))
    for form, rules in FORMS.items():
        rewrite(tmp_path, lambda own, rules=rules: renamed(own, rules))  # type: ignore[misc]
        assert torch.equal(logits(make_runner(tmp_path)), expected), form
    others = [name for name in load_file(tmp_path / "model.safetensors") if re.match(_VISION, name)]
    assert len(others) > 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({EMBEDDING: None}, f"{EMBEDDING}: missing tensor"),
        ({EMBEDDING: torch.zeros(320, 63)}, rf"{EMBEDDING}: shape \[320, 63\]"),
        ({"lm_head.weight": None}, "lm_head.weight: missing tensor"),
        # The language model twice, and what no such model has.
        ({"model.norm.weight": torch.ones(64)}, r"model\.norm\.weight: unexpected tensor"),
        ({"language_model.lm_head.weight": torch.ones(320, 64)}, "lm_head.weight: unexpected"),
        ({"model.audio_tower.weight": torch.ones(1)}, "model.audio_tower.weight: unexpected"),
    ],
)
def test_tensors_that_do_not_fit(
    change: dict[str, Tensor | None], reason: str, tmp_path: Path, make_runner: MakeRunner
) -> None:
    make_tiny(tmp_path, "mistral3", TINY_MODELS["mistral3"]["untied"])
    changed = {name: tensor for name, tensor in change.items() if tensor is not None}
    rewrite(tmp_path, lambda own: renamed(own, FORMS["language model within"]))
    rewrite(
        tmp_path, lambda own: {k: v for k, v in {**own, **changed}.items() if change.get(k, v) is v}
    )
    with pytest.raises(ModelError, match=reason):
        make_runner(tmp_path)


def test_random_weights_need_no_file(tmp_path: Path, make_runner: MakeRunner) -> None:
    make_tiny(tmp_path, "qwen3_vl", TINY_MODELS["qwen3_vl"]["tied"])
    (tmp_path / "model.safetensors").unlink()
    assert bool(logits(make_runner(tmp_path, load_format="dummy")).isfinite().all())
