"""Programs beside the products, of benchmarks above all, say with --help how they are called."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.device import ROOT, process_environment

_FOLDERS = ("benchmarks", "deploy", "models", "tests")
# One process for all: to import torch takes longer than to ask them.
_ASK = """
import contextlib, io, runpy, sys
for name in sys.argv[1:]:
    sys.argv[1:] = ["--help"]
    out, said = io.StringIO(), "it runs"
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        said = ended.code
    except Exception as error:
        said = repr(error)
    if said or not out.getvalue().startswith("usage: "):
        print(f"{name}: {said}")
"""


def programs_of(folder: str) -> Iterator[str]:
    """Those that say by themselves how they are started."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        text = path.read_text(encoding="utf-8")
        if f"python -m {name}" in text and "ArgumentParser(" in text:
            yield name


@pytest.mark.timeout(300)
def test_help() -> None:
    programs = [name for folder in _FOLDERS for name in programs_of(folder)]
    assert len(programs) > 30
    done = subprocess.run(
        [sys.executable, "-c", _ASK, *programs],
        cwd=ROOT,
        env=process_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("", 0), done.stderr
