"""Whose answers a gateway gives: of the model that it has, or that the cluster serves."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import shutil
from pathlib import Path

import pytest

from baton.services.gateway import own_model
from baton.services.gateway.own_model import Interrupted, own_digest
from baton.services.gateway.served_model import ServedModel
from baton.shared.directory.cluster_model import ClusterModel
from baton.shared.directory.workers import WorkerRecord
from baton.shared.engine.model_digest import identify_dummy, identify_model, weight_paths
from baton.shared.rpc.errors import ModelReplaced
from tests.unit.gateway.whole_gateway import worker_record

A, B = (ClusterModel(letter * 64, f"model-{letter}", 1000) for letter in "ab")


def record_of(digest: str, stamp: str = "") -> WorkerRecord:
    record = worker_record("both-0")
    capability = dataclasses.replace(record.capability, model_digest=digest)
    facts = dataclasses.replace(record.model, files_stamp=stamp)
    return dataclasses.replace(record, capability=capability, model=facts)


def test_with_weights_no_other_model_is_served(caplog: pytest.LogCaptureFixture) -> None:
    served = ServedModel("mine", 1000)
    served.has_weights(A.digest)
    served.check(None)
    served.learn(A)
    served.check(A.digest)
    assert served.takes(record_of(A.digest))
    for _ in range(2):
        served.learn(B)
        assert served.other == B and not served.takes(record_of(B.digest))
        for begun_on in (None, A.digest):
            with pytest.raises(ModelReplaced, match="'model-b' .digest bbb.*'mine' .digest aaa"):
                served.check(begun_on)
    [logged] = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert "'model-b'" in str(vars(logged)["fields"]["message"])
    # Its workers have gone, and nobody has come yet.
    served.learn(None)
    served.check(None)
    assert served.takes(record_of(A.digest))


def test_without_weights_the_clusters_model_is_served_and_the_next_one() -> None:
    served = ServedModel("mine", 1000)
    assert not served.takes(record_of(A.digest)), "not before it is known"
    served.check(None)
    served.learn(A)
    assert served.takes(record_of(A.digest))
    served.check(A.digest)
    served.learn(None)
    assert served.takes(record_of(A.digest)), "a directory that lost everything changes nothing"
    served.learn(B)
    assert served.takes(record_of(B.digest)) and not served.takes(record_of(A.digest))
    served.check(None)
    with pytest.raises(ModelReplaced):
        served.check(A.digest)
    # Even when that one is gone, too.
    served.learn(None)
    with pytest.raises(ModelReplaced):
        served.check(A.digest)


def test_without_weights_another_vocabulary_is_another_model() -> None:
    served = ServedModel("mine", 999)
    served.learn(A)
    assert served.other == A and not served.takes(record_of(A.digest))
    with pytest.raises(ModelReplaced, match="'model-a'.*'mine' .no weights here"):
        served.check(None)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """What is hashed need not be a model."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


async def digest_of(model_dir: Path, *workers: WorkerRecord, load_format: str = "auto") -> str:
    return await own_digest(model_dir, load_format, workers, asyncio.Event()) or ""


async def test_the_digest_is_the_workers(model_dir: Path) -> None:
    expected = identify_model(model_dir, weight_paths(model_dir), lambda _: None)
    assert await digest_of(model_dir, record_of("other", "of other files")) == expected.digest
    dummy = await digest_of(model_dir, load_format="dummy")
    assert dummy == identify_dummy(model_dir).digest != expected.digest
    (model_dir / "model.safetensors").write_bytes(b"WEIGHTS")
    assert await digest_of(model_dir) not in (expected.digest, dummy)


async def test_what_a_worker_of_this_host_has_read_is_not_read_again(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = model_dir / "model.safetensors"
    read = identify_model(model_dir, [weights], lambda _: None)
    worker = record_of(read.digest, read.files_stamp)
    elsewhere = model_dir / "copy"
    elsewhere.mkdir()
    for path in (weights, model_dir / "config.json"):
        shutil.copy2(path, elsewhere)
    assert await digest_of(elsewhere, worker) == read.digest

    monkeypatch.setattr(own_model, "identify_model", None)
    assert await digest_of(model_dir, worker) == read.digest
    for other in (worker, record_of(read.digest)):
        with pytest.raises(TypeError):
            await digest_of(elsewhere, other)
    # Written to in place, its times put back.
    times = weights.stat()
    weights.write_bytes(b"WEIGHTS")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(TypeError):
        await digest_of(model_dir, worker)


@pytest.mark.parametrize("missing", ["model.safetensors", "shards", "a shard"])
async def test_without_weights_there_is_no_digest(model_dir: Path, missing: str) -> None:
    (model_dir / "model.safetensors").unlink()
    if missing != "model.safetensors":
        names = {f"t{i}": f"model-{i}.safetensors" for i in range(2)}
        index = model_dir / "model.safetensors.index.json"
        index.write_text(str({"weight_map": names}).replace("'", '"'))
        if missing == "a shard":
            (model_dir / "model-0.safetensors").touch()
    assert await digest_of(model_dir) == ""


async def test_hashing_ends_with_the_process(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = asyncio.Event()
    stop.set()
    monkeypatch.setattr("baton.shared.engine.model_digest._CHUNK_BYTES", 1)
    clock = iter(range(1000))
    monkeypatch.setattr("baton.shared.engine.model_digest.time.monotonic", lambda: next(clock))
    with pytest.raises(Interrupted):
        await own_digest(model_dir, "auto", [], stop)
