"""Wheels for the Python of the image, whatever Python asks for them."""

from __future__ import annotations

from pathlib import Path

import pytest
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
    [(was_met, arguments)] = seen
    assert was_met is holds
    assert arguments[arguments.index("--python-version") + 1] == python
    assert arguments[-1] == "redis" and "--abi=cp311" in arguments
    assert marker.evaluate() is here
