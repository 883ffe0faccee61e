"""Heads that the package speculators has written give its logits.

eagle3_heads/ is of speculators 0.9.0, transformers 5.19.0, torch 2.13.0, with random weights of 16
numbers. `expected.safetensors` beside each has tokens, hidden states, and what `Eagle3DraftModel`
made of them, at once and a token further.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.draft_model import DraftModel
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.model_files.fields import ModelError
from tests.heads import make_target
from tests.unit.worker.conftest import CONFIG

HEADS = Path(__file__).parent / "eagle3_heads"
TARGET = {**CONFIG, "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3}
TABLE = [[0]]


def load(tmp_path: Path, head_dir: Path) -> DraftModel:
    torch.set_num_threads(1)
    target = make_target(tmp_path / "target", TARGET)
    how: dict[str, Any] = {"device": "cpu", "num_drafts": 1, "draft_kind": "eagle3"}
    runner = ModelRunner(
        EngineConfig(target, num_blocks=8, max_model_len=128, draft_model_dir=head_dir, **how)
    )
    assert runner.draft is not None
    return runner.draft


def check(head: DraftModel, expected: dict[str, torch.Tensor], own_ids: torch.Tensor) -> None:
    token_ids = expected["token_ids"].tolist()
    [features] = head.fuse([[expected["taps"]]])
    others = torch.ones(40, dtype=torch.bool)
    others[own_ids] = False
    with torch.inference_mode():
        row = BatchRow(token_ids, 0, TABLE, features=features, num_logits=12)
        logits = head.executor.logits(Batch([row]))
        assert logits.shape == (12, 40) and (logits[:, others] == -torch.inf).all()
        torch.testing.assert_close(logits[:, own_ids], expected["logits"], rtol=1e-4, atol=1e-4)
        for length in (3, 11):
            row = BatchRow(token_ids[:length], 0, TABLE, features=features[:length])
            made = head.launch([row]).taps(0)
            assert made is not None
            behind = BatchRow(token_ids[length : length + 1], length, TABLE, features=made[-1:])
            found = head.executor.logits(Batch([behind]))[0, own_ids]
            torch.testing.assert_close(found, expected["behind"][length - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3-norms", "llama-norm-before-fc"])
def test_a_head_gives_the_logits_of_the_package_that_wrote_it(tmp_path: Path, name: str) -> None:
    head = load(tmp_path, HEADS / name)
    expected = load_file(HEADS / name / "expected.safetensors")
    own_ids = torch.arange(24) + load_file(HEADS / name / "model.safetensors")["d2t"]
    assert head.tapped is not None and head.tapped.layers == (1, 2, 3)
    check(head, expected, own_ids)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The first of them, laid out as published heads are; its embedding is the model's."""
    head_dir = tmp_path / "published"
    shutil.copytree(HEADS / "llama", head_dir)
    config = json.loads((head_dir / "config.json").read_text())
    layer = config["transformer_layer_config"]
    inside = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
    fields = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 24}
    written = {**layer, **fields, "eagle_config": inside}
    (head_dir / "config.json").write_text(json.dumps(written))
    weights = load_file(head_dir / "model.safetensors")
    weights.pop("embed_tokens.weight")
    (head_dir / "model.safetensors").unlink()
    renamed = {name.replace("layers.0.", "midlayer."): each for name, each in weights.items()}
    save_file(renamed, head_dir / "model.safetensors")
    return head_dir


def test_a_head_as_others_publish_them_is_the_same(tmp_path: Path, published: Path) -> None:
    head = load(tmp_path, published)
    model: Any = head._model
    assert torch.equal(
        model.embedding,
        load_file(tmp_path / "target" / "model.safetensors")["model.embed_tokens.weight"],
    )
    own = load_file(HEADS / "llama" / "model.safetensors")
    model.embedding = own["embed_tokens.weight"]
    expected = load_file(HEADS / "llama" / "expected.safetensors")
    check(head, expected, torch.arange(24) + own["d2t"])


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path: Path, published: Path) -> None:
    weights = load_file(published / "model.safetensors")
    (published / "model.safetensors").unlink()
    weights["d2t"] = torch.full((24,), 20)
    save_file(weights, published / "model.safetensors")
    problem = r"d2t: 24 tokens become ids from 20 to 43; they must be different ones from 0 to 39"
    with pytest.raises(ModelError, match=problem):
        load(tmp_path, published)
