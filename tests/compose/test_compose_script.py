"""deploy/compose.sh, with an engine on paper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.device import ROOT

DEMO = ROOT / "models" / "demo"


class Engine:
    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.state = folder / "state.json"
        for name in ("docker", "compose"):
            program = self.bin / name
            fake = ROOT / "tests" / "compose" / "fake_engine.py"
            program.write_text(f"#!{sys.executable}\n{fake.read_text()}")
            program.chmod(0o755)
        self.holds()

    def holds(self, *containers: dict[str, Any]) -> None:
        self.state.write_text(json.dumps(containers))

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": path, "COMPOSE": "compose", "FAKE_ENGINE": str(self.state)}
        return subprocess.run(
            [str(ROOT / "deploy" / "compose.sh"), *arguments],
            env=own | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, *words: str) -> list[dict[str, Any]]:
        """Those whose arguments hold all of `words`."""
        journal = Path(f"{self.state}.calls")
        lines = journal.read_text().splitlines() if journal.exists() else []
        found: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return [call for call in found if set(words) <= {call["program"], *call["arguments"]}]


def container(service: str, **more: Any) -> dict[str, Any]:
    known: dict[str, Any] = {"id": f"{service}-id", "service": service, "status": "running"}
    known |= {"restarts_before": 0, "restarts": 0, "ended_before": "0001", "ended": "2026"}
    known |= {"code": 0, "oom": False, "health": "healthy", "image": "baton:cpu"}
    known |= {"labels": {}, "env": [], "log": "started\n"}
    return known | more


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path)


def model_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("what", ["missing", "empty", "dangling"])
def test_a_wrong_path_is_refused_before_the_engine_is_asked(
    what: str, engine: Engine, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    if what != "missing":
        model.mkdir()
    if what == "dangling":
        (model / "config.json").symlink_to("../../blobs/0")
    run = engine.run("up", MODEL=str(model))
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith(f"MODEL={model}: no ") and run.stderr.count("\n") == 1
    assert engine.calls() == []


def test_a_model_that_the_roles_may_not_see_is_refused(engine: Engine, tmp_path: Path) -> None:
    model = model_in(tmp_path / "m")
    (model / "model.safetensors").symlink_to("/root/blobs/0")
    run = engine.run("up", MODEL=str(model))
    assert run.returncode == 2 and run.stderr.startswith("/root/blobs: nobody but root may look")
    assert engine.calls() == []


def test_paths_are_made_absolute_and_may_have_spaces(engine: Engine, tmp_path: Path) -> None:
    model = model_in(tmp_path / "my models" / "one:two")
    relative = os.path.relpath(model, ROOT)
    assert engine.run("build", MODEL=relative).returncode == 0
    [build] = engine.calls("build")
    assert build["environment"] == {"MODEL": str(model), "MODEL_LINKS": ""}


def test_a_fetched_model_has_a_name(engine: Engine, tmp_path: Path) -> None:
    fetched, cache = model_in(tmp_path / "baton" / "models" / "smollm2"), str(tmp_path)
    assert engine.run("build", MODEL="smollm2", XDG_CACHE_HOME=cache).returncode == 0
    [build] = engine.calls("build")
    assert build["environment"]["MODEL"] == str(fetched)
    refused = engine.run("build", MODEL="smollm2", HOME=str(tmp_path))
    assert refused.returncode == 2 and "smollm2: no such directory" in refused.stderr


def test_the_files_of_a_snapshot_come_along(engine: Engine, tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "5ca1ab1e"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("config.json", "model.safetensors")):
        (blobs / str(number)).write_text("{}")
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert engine.run("build", MODEL=str(snapshot)).returncode == 0
    [build] = engine.calls("build")
    assert build["environment"] == {"MODEL": str(snapshot), "MODEL_LINKS": str(blobs)}


def test_links_into_several_directories_are_refused_by_name(engine: Engine, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        target = tmp_path / f"of {name}" / name
        target.parent.mkdir()
        target.write_text("{}")
        (model / name).symlink_to(target)
    run = engine.run("up", MODEL=str(model))
    assert run.returncode == 2 and "MODEL_LINKS" in run.stderr
    assert str(tmp_path / "of config.json") in run.stderr
    assert engine.run("build", MODEL=str(model), MODEL_LINKS=str(tmp_path)).returncode == 0


def test_up_keeps_what_was_scaled(engine: Engine) -> None:
    engine.holds(
        container("gateway"),
        container("prefill"),
        container("decode"),
        container("decode", id="decode-2"),
    )
    run = engine.run("up")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "decode: 2 containers, as scaled before",
        "gRPC on 127.0.0.1:7000, HTTP on 127.0.0.1:7000",
    ]
    assert engine.calls("up", "--scale", "decode=2")


LOG = "02:00:00 decode INFO looking\nbaton worker: model: config.json: no such file\nTraceback\n"


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        ({"status": "restarting", "code": 2}, "baton worker: model: config.json: no such file"),
        ({"status": "running", "restarts": 3}, "baton worker: model: config.json: no such file"),
        ({"restarts": 3, "log": "a\nthe last\n"}, "the last"),
        ({"restarts": 3, "oom": True, "log": "x\n"}, "killed for want of memory; x"),
    ],
)
def test_a_role_that_cannot_start_ends_it_with_its_own_last_line(
    failing: dict[str, Any], said: str, engine: Engine
) -> None:
    engine.holds(
        container("prefill"),
        container("decode", health="unhealthy", **({"log": LOG} | failing)),
        container("decode", id="decode-2", health="starting"),
    )
    run = engine.run("up")
    assert run.returncode == 1
    assert run.stderr == f"decode: {said}\n"
    [stop] = engine.calls("docker", "stop")
    assert stop["arguments"][-2:] == ["decode-id", "decode-2"]


def test_what_failed_before_does_not_count(engine: Engine) -> None:
    """Restarts of long ago, and a container that an earlier start has stopped."""
    stopped = container("prefill", status="exited", code=2, ended_before="2026")
    engine.holds(container("gateway"), container("decode", restarts_before=7, restarts=8), stopped)
    assert engine.run("up").returncode == 0
    assert engine.calls("docker", "stop") == []


def test_scale_keeps_what_up_was_given(engine: Engine) -> None:
    engine.holds(
        container(
            "decode",
            image="own:image",
            labels={"baton.model": "/a model", "baton.model-links": "/blobs"},
            env=["BATON_TOKEN_BUDGET=77", "BATON_ROLE=decode", "PATH=/bin"],
        )
    )
    run = engine.run("scale", "decode", "2", MODEL="/another", BATON_TOKEN_BUDGET="5")
    assert run.returncode == 0, run.stderr
    [up] = engine.calls("up", "--scale", "decode=2", "--no-recreate")
    assert up["environment"] == {
        "MODEL": "/a model",
        "MODEL_LINKS": "/blobs",
        "IMAGE": "own:image",
        "BATON_TOKEN_BUDGET": "77",
    }
    assert "compose.gpu.yaml" not in up["arguments"]


def test_scale_on_gpus_takes_their_file_too(engine: Engine) -> None:
    engine.holds(container("decode", env=["BATON_DEVICE=cuda"]))
    assert engine.run("scale", "decode", "2").returncode == 0
    assert engine.calls("up", "compose.gpu.yaml")


def test_scale_fails_with_the_role_that_does(engine: Engine) -> None:
    failing = container("decode", id="d2", status="restarting", code=2, health="starting")
    engine.holds(container("decode"), failing | {"log": "baton worker: max_model_len: no room\n"})
    run = engine.run("scale", "decode", "2")
    assert (run.returncode, run.stderr) == (1, "decode: baton worker: max_model_len: no room\n")


@pytest.mark.parametrize("arguments", [("gateway", "2"), ("decode", "x"), ("", ""), ("decode",)])
def test_scale_says_how_it_is_asked(arguments: tuple[str, ...], engine: Engine) -> None:
    run = engine.run("scale", *arguments)
    assert (run.returncode, run.stderr) == (2, "make scale ROLE=prefill|decode N=number\n")
    assert engine.run("scale", "decode", "2").stderr.startswith("nothing runs")
