"""Devices, kernels and transports that were asked for by name and cannot be had: one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device import ROOT, process_environment

pytestmark = pytest.mark.e2e

_PATIENCE_S = 60.0


def refused(model: Path, *flags: str, **environment: str) -> str:
    """What a worker says that must not start; none of them sees a GPU."""
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "baton.services.worker",
            "--role",
            "both",
            "--model",
            str(model),
            *flags,
        ],
        cwd=ROOT,
        env=process_environment(CUDA_VISIBLE_DEVICES="", **environment),
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
        check=False,
    )
    assert (run.returncode, run.stdout) == (2, ""), run.stderr
    assert run.stderr.startswith("baton worker: ") and run.stderr.count("\n") == 1, run.stderr
    return run.stderr.removeprefix("baton worker: ")


def test_triton_on_a_cpu(tiny_model: Path) -> None:
    flags = ("--device", "cpu", "--kernels", "triton", "--transport", "shm")
    assert refused(tiny_model, *flags).startswith("kernels: triton was asked for, but ")


# Without the wheel it misses a transport first.
@pytest.mark.nixl
def test_cuda_without_cuda(tiny_model: Path) -> None:
    message = refused(tiny_model, "--device", "cuda", "--transport", "auto", "--role", "prefill")
    assert "device: cuda was asked for, but torch finds no CUDA device" in message


def test_nixl_without_the_wheel(tiny_model: Path, tmp_path: Path) -> None:
    # Imported before those that are installed.
    for name in ("nixl_cu12", "nixl_cu13"):
        (tmp_path / f"{name}.py").write_text(
            f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n"
        )
    message = refused(
        tiny_model,
        *("--device", "cpu", "--kernels", "torch", "--transport", "nixl", "--role", "both"),
        PYTHONPATH=_before_others(tmp_path),
    )
    assert message.startswith("--transport nixl: NIXL is not installed (pip install nixl-cu13)")


def test_a_wheel_of_nixl_that_does_not_load(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("nixl_cu12", "nixl_cu13"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('libucp.so.0: no such file')\n")
    message = refused(
        tiny_model,
        *("--device", "cpu", "--kernels", "torch", "--transport", "nixl"),
        PYTHONPATH=_before_others(tmp_path),
    )
    assert message.startswith("--transport nixl: nixl_cu1")
    assert "does not load: libucp.so.0: no such file" in message


def _before_others(directory: Path) -> str:
    return os.pathsep.join([str(directory), process_environment()["PYTHONPATH"]])
