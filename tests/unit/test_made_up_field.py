"""A sampling field is one declaration: here is one that Baton does not have."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.device import ROOT

_DECLARATION = """\
    loudness: float = declared(
        Kind.NUMBER, 0.5, limit=within(0, 1), metavar="L", help="how loud to speak"
    )
"""
_IN_CONTRACT = "  optional float loudness = 900;\n"


def test_one_declaration_is_all_that_a_field_needs(tmp_path: Path) -> None:
    for folder in ("baton", "shared", "services"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True)
    insert(tmp_path / "shared/sampling.py", before="    ignore_eos: bool", text=_DECLARATION)
    types = Path("baton/v1/types.proto")
    contract = tmp_path / "protos" / types
    contract.parent.mkdir(parents=True)
    shutil.copy(ROOT / "protos" / types, contract)
    insert(contract, before="  // 0 is greedy;", text=_IN_CONTRACT)
    stubs = [f"--proto_path={tmp_path / 'protos'}", f"--python_out={tmp_path / 'shared/gen'}"]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", *stubs, str(types)], check=True, timeout=60
    )

    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.made_up_field"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def insert(path: Path, *, before: str, text: str) -> None:
    whole = path.read_text()
    assert whole.count(before) == 1
    path.write_text(whole.replace(before, text + before))
