"""Ctrl-C while a program starts, before it waits for signals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "models" / "demo")

RUN = """
import os, runpy, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == interrupted_at:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
interrupted_at, program, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(program, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("imported", "argv"),
    [
        ("grpc", ["baton.services.launcher", "up", "--model", MODEL]),
        ("baton.services.launcher.stack", ["baton.services.launcher", "up", "--model", MODEL]),
        ("baton.services.launcher.status", ["baton.services.launcher", "status"]),
        ("baton.services.launcher.health", ["baton.services.launcher", "health", "127.0.0.1:1"]),
        ("baton.services.worker.worker", ["baton.services.decode", "--model", MODEL]),
        ("uvloop", ["baton.services.prefill", "--model", MODEL]),
        ("argparse", ["baton.services.worker", "--role", "both", "--model", MODEL]),
        ("argparse", ["baton.services.gateway", "--model", MODEL]),
    ],
)
def test_ctrl_c_during_the_start_is_told_in_a_line(imported: str, argv: list[str]) -> None:
    """Sent when `imported` is about to be."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, imported, *argv],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
