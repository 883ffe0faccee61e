"""Wheels for the Python of the image, whatever Python asks for them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from pip._internal.cli.main import main as pip
from pip._vendor.packaging.markers import Marker

from deploy import wheelhouse


@pytest.mark.parametrize(("python", "holds"), [("3.11.2", True), ("3.11.7", False)])
def test_requirements_are_judged_for_the_image(
    python: str, holds: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """redis needs async-timeout before 3.11.3 only."""
    marker = Marker('python_full_version < "3.11.3"')
    here = marker.evaluate()
    seen = []

    def pip(arguments: list[str]) -> int:
        seen.append((marker.evaluate(), arguments))
        return 0

    monkeypatch.setattr(wheelhouse, "pip", pip)
    assert wheelhouse.download(python, tmp_path, ["redis"]) == 0
    was_met, arguments = seen[-1]
    assert was_met is holds
    assert arguments[arguments.index("--python-version") + 1] == python
    assert arguments[-1] == "redis" and "--abi=cp311" in arguments
    assert marker.evaluate() is here


def test_without_an_index_it_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The index that was named is asked once, for one small thing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    asked = []

    def counted(arguments: list[str]) -> int:
        asked.append(arguments)
        return pip(["--isolated", *arguments])

    monkeypatch.setattr(wheelhouse, "pip", counted)
    index = ["--index-url", f"http://127.0.0.1:{port}"]
    assert wheelhouse.download("3.11.2", tmp_path, ["redis", *index, "grpcio>=1"]) != 0
    [arguments] = asked
    assert arguments[-4:] == ["--timeout=10", *index, "hatchling"] and "--retries=0" in arguments
    assert "wheelhouse: hatchling did not come: no package index" in capsys.readouterr().err
