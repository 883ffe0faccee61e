"""Weight files that are missing, damaged, or not this model's: refused in one line, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.shared.engine.config import ModelError
from baton.shared.engine.model_digest import ProgressReport
from baton.shared.engine.weights import WeightFiles
from tests.unit.engine.conftest import MakeLlama, MakeRunner

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


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


def test_no_safetensors(make_llama: MakeLlama, make_runner: MakeRunner) -> None:
    model_dir, _ = make_llama()
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    assert "model.safetensors: no such file" in refused(make_runner, model_dir)


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
        ({"dtype": "I8", "shape": [16], "data_offsets": [0, 16]}, "dtype I8"),
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


def test_a_tied_head_and_old_rope_tables_are_ignored(
    make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama(tie_word_embeddings=True)
    extra = {
        "lm_head.weight": torch.zeros(320, 64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    change_tensors(model_dir, lambda tensors: tensors.update(extra))
    make_runner(model_dir)


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


def test_the_digest_covers_config_and_weights(
    make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama()
    first = make_runner(model_dir).model_digest
    assert first == make_runner(model_dir).model_digest
    change_tensors(model_dir, lambda tensors: tensors[Q_PROJ].add_(1))
    second = make_runner(model_dir).model_digest
    path = model_dir / "config.json"
    path.write_text(path.read_text() + "\n")
    assert len({first, second, make_runner(model_dir).model_digest}) == 3


def test_progress_is_told_after_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [0.0], list[str]()
    monkeypatch.setattr("baton.shared.engine.model_digest.time.monotonic", lambda: now[0])
    report = ProgressReport(told.append, "loading", 200)
    for now[0] in (0.5, 1.1, 1.5, 2.2):
        report.advance(50)
    assert told == ["loading: 50%", "loading: 100%"]
