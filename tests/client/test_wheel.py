"""The wheel alone in fresh environments, at both ends of what it accepts, against a running stack.

Needs the package index, as an installation does.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc
from tests.client.proxy import CuttingProxy
from tests.device import ROOT
from tests.e2e.launched import Launched, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PROBE = Path(__file__).with_name("wheel_probe.py")
CUT_AFTER = [700, 400]
"""Bytes: the first in mid-answer, however tokens share messages; the second mostly."""
RUNTIMES = {"oldest": ["grpcio==1.72.1", "protobuf==6.30.0"], "newest": ["--upgrade"]}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={out}",
         str(ROOT / "clients" / "python"))  # fmt: skip
    [path] = out.glob("baton_client-*.whl")
    return path


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [metadata] = [name for name in names if name.endswith("METADATA")]
        requires = re.findall(r"^Requires-Dist: (.+)$", archive.read(metadata).decode(), re.M)
    assert sorted(requires) == ["grpcio>=1.72.1", "protobuf<8,>=6.30.0"]
    expected = {"py.typed", "v1/types_pb2.pyi", "v1/inference_service_pb2_grpc.pyi"}
    expected |= {f"protos/baton/v1/{name}.proto" for name in
                 ("types", "error_details", "inference_service")}  # fmt: skip
    assert {f"baton_client/{name}" for name in expected} <= names
    assert all(name.startswith("baton_client") for name in names)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_alone_against_a_running_stack(
    runtime: str, wheel: Path, stack: Launched, tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    _pip("--python", str(python), "install", *RUNTIMES[runtime], str(wheel))
    address = stack.wait_ready()
    num_cancelled = _num_cancelled(address)
    with (
        CuttingProxy(address, cut_after=CUT_AFTER) as one,
        CuttingProxy(address, cut_after=CUT_AFTER) as other,
    ):
        seen = _probe(python, tmp_path, address, one.address, other.address)
        assert one.num_cut and other.num_cut

    assert "torch" not in seen["installed"] and "baton-llm" not in seen["installed"]
    versions = seen["versions"]
    if runtime == "oldest":
        assert (versions["grpcio"], versions["protobuf"]) == ("1.72.1", "6.30.0")
    else:
        assert versions["protobuf"].startswith("7.")
    for kind in ("sync", "async"):
        _assert_served(seen[kind])
    assert seen["sync"]["whole"] == seen["async"]["whole"]
    # What the client gave up, the cluster did: by cancel and by deadline, of both clients.
    wait_for(lambda: _num_cancelled(address) >= num_cancelled + 2)


def _assert_served(seen: dict[str, Any]) -> None:
    text, token_ids, num_resumes = seen["cut"]
    assert num_resumes >= 1
    assert [text, token_ids, 0] == seen["whole"] and len(token_ids) == 128
    assert seen["joined"] == [text, token_ids]
    assert seen["by_tokens"] == text and seen["text"] == "In the beginning God created"
    assert seen["info"] == ["demo", True, 2]
    assert seen["deadline"][0] == "DeadlineExceeded"
    assert seen["cancel"][0] == "Cancelled"
    assert seen["invalid"] == ["InvalidRequest", "sampling.top_p", "0 to 1"]


def _probe(python: Path, tmp_path: Path, *addresses: str) -> dict[str, Any]:
    # Away from the tree: what it imports is what was installed.
    done = subprocess.run(
        [python, "-I", PROBE, *addresses],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def _num_cancelled(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        info = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=60)
    return info.counters.num_cancelled


def _pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
