"""`make stubs`: stubs where their generators are, otherwise the command for elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device import ROOT


def stubs(out: Path, language: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "clients/stubs.py", "--lang", language, "--out", str(out / "stubs")]
    return subprocess.run(
        [*command, "--tools", str(out / "tools")],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_python(tmp_path: Path) -> None:
    done = stubs(tmp_path, "python")
    assert done.returncode == 0, done.stderr
    made = {path.name for path in (tmp_path / "stubs" / "baton" / "v1").iterdir()}
    assert {"types_pb2.py", "inference_service_pb2_grpc.py", "types_pb2.pyi"} <= made
    assert not any("prefill" in name for name in made)  # nobody's business but Baton's


@pytest.mark.parametrize(
    ("language", "install", "flag"),
    [
        ("go", "protoc-gen-go-grpc", "--go-grpc_out="),
        ("java", "grpc-java-plugin", "--grpc-java_out="),
        ("ts", "npm install ts-proto", "--ts_proto_out="),
    ],
)
def test_without_generators(tmp_path: Path, language: str, install: str, flag: str) -> None:
    done = stubs(tmp_path, language, PATH=str(tmp_path))
    assert done.returncode == 3
    assert install in done.stderr
    [command] = [line for line in done.stderr.splitlines() if "--proto_path=protos" in line]
    assert command.strip().startswith("protoc ") and f"{flag}{tmp_path}/stubs" in command
    assert not (tmp_path / "stubs").exists()
