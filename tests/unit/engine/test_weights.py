"""Weight files that are missing, damaged, or not this model's: refused in one line, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.model_digest import ProgressReport, find_weight_files
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.weights import WeightFiles
from baton.shared.model_files.fields import ModelError
from tests.device import ON_GPU
from tests.unit.engine.conftest import MakeLlama, MakeRunner
from tests.unit.engine.tiny_models import TINY_MODELS, make_tiny

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
TWICE = [(0, [0, 2]), (1, [2, 4]), (1, [4, 6])]
"""Tensors x.0 and x.1 of a header, and where they lie."""


def refused(make_runner: MakeRunner, model_dir: Path) -> str:
    with pytest.raises(ModelError) as caught:
        make_runner(model_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_tensors(model_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_form_that_shares_its_norm_with_another(tmp_path: Path, make_runner: MakeRunner) -> None:
    """mamba2's authors call its embedding otherwise, and all else as later files do."""
    make_tiny(tmp_path, "mamba2", TINY_MODELS["mamba2"]["as they come"])

    def rename(tensors: dict[str, Any]) -> None:
        tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")

    change_tensors(tmp_path, rename)
    assert make_runner(tmp_path).model_config.model_type == "mamba2"


def test_no_safetensors(make_llama: MakeLlama, make_runner: MakeRunner) -> None:
    model_dir, _ = make_llama()
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    assert "model.safetensors: no such file" in refused(make_runner, model_dir)


@pytest.mark.parametrize("shard_size", ["100KB", "5GB"])
def test_files_that_are_called_otherwise(
    shard_size: str, make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    """As auto-gptq calls them. Of several nobody says which is the model's."""
    model_dir, _ = make_llama(max_shard_size=shard_size)
    expected = make_runner(model_dir)
    listing = find_weight_files(model_dir)[0]
    ending = listing.name.removeprefix("model")
    listing.rename(model_dir / f"gptq_model-4bit-64g{ending}")
    found = make_runner(model_dir)
    assert torch.equal(logits(found), logits(expected))
    if shard_size == "5GB":
        (model_dir / "adapter_model.safetensors").touch()
        message = refused(make_runner, model_dir)
        assert "which is the model's of adapter_model.safetensors, gptq_model-4bit-64g" in message


@pytest.mark.parametrize("keep", [0, 7, 100, -1, -1000])
def test_a_truncated_file(keep: int, make_llama: MakeLlama, make_runner: MakeRunner) -> None:
    model_dir, _ = make_llama()
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = refused(make_runner, model_dir)
    assert "model.safetensors: " in message and "truncated" in message


@pytest.mark.parametrize(
    ("start", "replacement"),
    [(0, b"\xff" * 8), (8, b"not json"), (0, (2**40).to_bytes(8, "little"))],
)
def test_a_corrupt_header(
    start: int, replacement: bytes, make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama()
    path = model_dir / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[start : start + len(replacement)] = replacement
    path.write_bytes(content)
    assert "model.safetensors: header" in refused(make_runner, model_dir)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}, "data_offsets"),
        ({"dtype": "I9", "shape": [16], "data_offsets": [0, 16]}, "dtype I9"),
        ({"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}, "malformed"),
        ({"dtype": "F32", "shape": [4]}, "malformed"),
        ([], "malformed"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}, "gap"),
    ],
)
def test_a_header_that_lies(entry: Any, reason: str, tmp_path: Path) -> None:
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(16)
    )
    with pytest.raises(ModelError, match=reason):
        WeightFiles(tmp_path)


def test_a_tensor_that_is_there_twice(tmp_path: Path) -> None:
    """JSON allows it, and readers take one or the other."""
    entries = [f'"x.{i}": {{"dtype": "U8", "shape": [2], "data_offsets": {o}}}' for i, o in TWICE]
    header = f"{{{', '.join(entries)}}}".encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(6))
    with pytest.raises(ModelError, match=r'model\.safetensors: "x\.1": repeated in the header'):
        WeightFiles(tmp_path)
    path.rename(tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "a.safetensors", "y": "a.safetensors", "x": "b.safetensors"}}'
    )
    with pytest.raises(ModelError, match=r'index\.json: weight_map: "x" is repeated'):
        WeightFiles(tmp_path)


def test_tensors_that_do_not_fit_the_config(make_llama: MakeLlama, make_runner: MakeRunner) -> None:
    model_dir, _ = make_llama()
    change_tensors(model_dir, lambda tensors: tensors.pop(Q_PROJ))
    assert f"{Q_PROJ}: missing tensor" in refused(make_runner, model_dir)

    model_dir, _ = make_llama()
    change_tensors(model_dir, lambda tensors: tensors.update({Q_PROJ: torch.zeros(64, 63)}))
    assert f"{Q_PROJ}: shape [64, 63]" in refused(make_runner, model_dir)

    model_dir, _ = make_llama()
    bias = Q_PROJ.replace("weight", "bias")
    change_tensors(model_dir, lambda tensors: tensors.update({bias: torch.zeros(64)}))
    assert f"{bias}: unexpected tensor" in refused(make_runner, model_dir)


def test_old_rope_tables_are_ignored(make_llama: MakeLlama, make_runner: MakeRunner) -> None:
    model_dir, _ = make_llama()
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    change_tensors(model_dir, lambda tensors: tensors.update(extra))
    make_runner(model_dir)


def logits(runner: ModelRunner) -> torch.Tensor:
    return runner.logits(Batch([BatchRow(list(range(20)), 0, [[0, 1]])]))


@pytest.mark.parametrize("kept", ["both", "embedding", "head"])
def test_of_tied_weights_a_file_may_have_either_name_or_both(
    kept: str, make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama(tie_word_embeddings=True)
    expected = logits(make_runner(model_dir))

    def rename(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
        if kept != "both":
            del tensors["lm_head.weight" if kept == "embedding" else EMBEDDING]

    change_tensors(model_dir, rename)
    assert torch.equal(logits(make_runner(model_dir)), expected)


def test_a_head_that_is_not_the_embedding_counts_though_the_config_ties_them(
    make_llama: MakeLlama, make_runner: MakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    """As in transformers, whose model is loaded from the same files."""
    model_dir, _ = make_llama(tie_word_embeddings=True)
    head = {"lm_head.weight": torch.randn(320, 64, generator=torch.Generator().manual_seed(4))}
    change_tensors(model_dir, lambda tensors: tensors.update(head))
    model: Any = LlamaForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
    with torch.no_grad():
        expected = model.eval()(torch.arange(20)[None]).logits[0, -1:]
    limit = 1e-3 * float(expected.abs().max()) if ON_GPU else 1e-4
    torch.testing.assert_close(logits(make_runner(model_dir)).cpu(), expected, atol=limit, rtol=0)
    assert "tied embeddings are not" in caplog.text


@pytest.mark.parametrize(
    "file_name", ["../model.safetensors", "/etc/x.safetensors", "pytorch_model.bin", 3]
)
def test_an_index_must_stay_in_the_directory(
    file_name: Any, make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama(max_shard_size="100KB")
    index = model_dir / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][Q_PROJ] = file_name
    index.write_text(json.dumps(content))
    message = refused(make_runner, model_dir)
    assert "model.safetensors.index.json: weight_map" in message and Q_PROJ in message


def test_an_index_that_does_not_match_its_files(
    make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama(max_shard_size="100KB")
    index = model_dir / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    (model_dir / files[-1]).unlink()
    assert f"{files[-1]}: no such file" in refused(make_runner, model_dir)

    index.write_text("{")
    assert "model.safetensors.index.json" in refused(make_runner, model_dir)


def test_tensors_that_the_index_assigns_to_another_shard_load_from_there(
    make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama(max_shard_size="100KB")
    expected = logits(make_runner(model_dir))
    index = json.loads((model_dir / "model.safetensors.index.json").read_text())["weight_map"]
    others = sorted(set(index.values()) - {index[Q_PROJ]})
    for path in (model_dir / others[0], model_dir / others[-1]):
        # One that the index does not name at all is nowhere.
        extra = {Q_PROJ: torch.zeros(3), "model.layers.7.mlp.up_proj.weight": torch.zeros(2)}
        save_file({**load_file(path), **extra}, path)
    assert torch.equal(logits(make_runner(model_dir)), expected)


def test_what_the_index_says_is_part_of_the_digest(
    make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama(max_shard_size="100KB")
    index_path = model_dir / "model.safetensors.index.json"
    content = json.loads(index_path.read_text())
    names = content["weight_map"]
    other = next(file for file in names.values() if file != names[Q_PROJ])
    path = model_dir / other
    save_file({**load_file(path), Q_PROJ: torch.zeros(64, 64)}, path)
    one = make_runner(model_dir)
    names[Q_PROJ] = other
    index_path.write_text(json.dumps(content))
    two = make_runner(model_dir)
    assert (
        not torch.equal(logits(one), logits(two))
        and one.model_identity.digest != two.model_identity.digest
    )


def test_the_digest_covers_config_and_weights(
    make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama()
    first = make_runner(model_dir).model_identity.digest
    assert first == make_runner(model_dir).model_identity.digest
    change_tensors(model_dir, lambda tensors: tensors[Q_PROJ].add_(1))
    second = make_runner(model_dir).model_identity.digest
    path = model_dir / "config.json"
    path.write_text(path.read_text() + "\n")
    assert len({first, second, make_runner(model_dir).model_identity.digest}) == 3


def test_progress_is_told_after_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [0.0], list[str]()
    monkeypatch.setattr("baton.shared.engine.model_digest.time.monotonic", lambda: now[0])
    report = ProgressReport(told.append, "loading", 200)
    for now[0] in (0.5, 1.1, 1.5, 2.2):
        report.advance(50)
    assert told == ["loading: 50%", "loading: 100%"]
